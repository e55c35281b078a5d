# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A sweep from a notebook
#
# A sweep is a table of runs: methods × compressions × seeds. It is written as a dictionary with the
# keys of a TOML file, trained by one compiled program, and comes back as one frame, a row per run
# and evaluation. Nothing is lost if you stop it: the same call continues where it stopped.

# %%
import matplotlib.pyplot as plt
import polars as pl

import jaxprune as jp

jp.use_all_cores()  # before JAX computes anything: one CPU device per core

spec = {
    'name': 'notebook',
    'model': {'name': 'mlp', 'widths': [100]},
    'data': {'name': 'mnist_small', 'train_examples': 4000},
    'train': {'epochs': 3, 'optimizer': 'adam', 'learning_rate': 0.003},
    'grid': {
        'method': ['random', 'magnitude', 'snip', {'name': 'synflow', 'rounds': 20}],
        'compression': [1, 5, 20, 50, 200, 1000],
        'seed': [0, 1, 2],
    },
}
frame = jp.run_sweep(spec, out='runs/notebook')
frame.head(3)

# %% [markdown]
# Each run reports two compressions: how many weights it kept (`compression`), and how many of those
# lie on a path from input to output at all (`effective_compression`). Runs with the same seed start
# from the same weights and see the same data, so methods are compared in pairs.

# %%
last = frame.filter(pl.col('epoch') == 3)
dense = 100 * last.filter(pl.col('label') == 'dense')['test_accuracy'].mean()

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout='constrained')
for label in ('random', 'magnitude', 'SNIP', 'SynFlow'):
    rows = last.filter(pl.col('label') == label)
    by = rows.group_by('target_compression').agg(
        pl.col('test_accuracy', 'effective_compression').mean(),
        low=pl.col('test_accuracy').min(),
        high=pl.col('test_accuracy').max(),
    )
    by = by.sort('target_compression')
    for ax, column in zip(axes, ('target_compression', 'effective_compression'), strict=True):
        (line,) = ax.plot(by[column], 100 * by['test_accuracy'], 'o-', label=label)
        ax.fill_between(
            by[column], 100 * by['low'], 100 * by['high'], color=line.get_color(), alpha=0.15
        )
for ax, title in zip(axes, ('weights kept', 'weights on a path'), strict=True):
    ax.axhline(dense, color='0.3', linewidth=0.8)
    ax.set(xscale='log', xlabel='compression', title=f'compression by {title}')
axes[0].set_ylabel('test accuracy (%), mean and range of 3 seeds')
axes[0].legend()
plt.show()

# %% [markdown]
# The page with all figures, layer by layer:

# %%
from jaxprune import report

print(report.write('runs/notebook'))
