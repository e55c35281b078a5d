"""Data sets: the embedded one against its source, prepared ones bit by bit, draws by their laws."""

import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from prepared import prepared

from jaxprune import data
from jaxprune.data import array_record, draw_mnist_small, mnist_small
from jaxprune.errors import DataError

FEW = settings(max_examples=10, deadline=None)  # every new shape is compiled anew
SPLITS = ('train', 'test')


@pytest.fixture(scope='module')
def mnist() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All labels, and the images that the embedded set holds; zeros elsewhere, to save seconds."""
    place = prepared('mnist')

    def read(split):
        def decoded(source, shape):
            records = source.__getitems__(list(range(len(source))))
            images = np.zeros((len(source), *shape), np.uint8)
            for i in mnist_small.indices(split):
                with Image.open(io.BytesIO(records[i]['image'])) as image:
                    images[i] = np.asarray(image).reshape(shape)
            return images, np.array([record['label'] for record in records], np.int32)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(array_record, '_decode', decoded)
            return array_record.read('mnist', split, place)

    return {split: read(split) for split in SPLITS}


# --- what is known beforehand ----------------------------------------------------------------


def test_unknown_set_offers_the_nearest_name():
    with pytest.raises(DataError, match=r"'cifar11'.*did you mean 'cifar10"):
        data.facts('cifar11')
    with pytest.raises(DataError, match='valid: cifar10, cifar100, fashion_mnist, mnist'):
        data.load('zzz')


@pytest.mark.slow
def test_mnist_constants_are_the_moments_of_its_pixels():
    """Expectation: four published digits are the moments of all training pixels, rounded."""
    pixels = array_record.read('mnist', 'train', prepared('mnist'))[0] / 255
    assert round(pixels.mean(), 4) == data.facts('mnist').mean[0]
    assert round(pixels.std(), 4) == data.facts('mnist').std[0]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'error'), [('fashion_mnist', 6e-5), ('cifar10', 2e-3)])
def test_other_constants_are_the_moments_of_their_pixels(name, error):
    """Expectation: as for MNIST; a CIFAR-10 that went through JPEG is off in the third digit."""
    loaded = data.load(name, prepared(name))
    pixels = loaded.train.images / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), loaded.mean, atol=error)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), loaded.std, atol=error)


# --- the embedded set ------------------------------------------------------------------------


def test_mnist_small_is_balanced_and_complete():
    """Expectation: 1,000 and 200 images per digit, as its licence note says."""
    small = data.load('mnist_small')
    assert small.name == 'mnist_small'
    for split, size in ((small.train, 10_000), (small.test, 2_000)):
        assert split.images.shape == (size, 28, 28, 1)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(np.bincount(split.labels), [size // 10] * 10)


@pytest.mark.more  # reads 70,000 images; the embedded file does not change
@pytest.mark.parametrize('split', SPLITS)
def test_mnist_small_is_mnist_bit_for_bit(mnist, split):
    """Expectation: the full set's own images and labels at the positions the file keeps."""
    images, labels = mnist_small.read(split)
    places = mnist_small.indices(split)
    assert np.all(np.diff(places) > 0)  # ascending, so none twice
    np.testing.assert_array_equal(images, mnist[split][0][places])
    np.testing.assert_array_equal(labels, mnist[split][1][places])


@pytest.mark.more
def test_drawing_again_gives_the_embedded_file(mnist):
    """Expectation: the shipped file is what the shipped script draws."""
    again = draw_mnist_small.draw(mnist, draw_mnist_small.SEED)
    with np.load(mnist_small.FILE) as shipped:
        assert set(shipped) == set(again)
        for name, array in again.items():
            assert array.dtype == shipped[name].dtype
            np.testing.assert_array_equal(shipped[name], array)


# --- prepared sets ---------------------------------------------------------------------------


def write_prepared(place: Path, name: str, images: np.ndarray, labels: np.ndarray) -> Path:
    """Writes what `tfds build` writes, by hand: one shard, the same examples in both splits."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

    folder = place / name / '3.0.2'
    folder.mkdir(parents=True)
    for split in SPLITS:
        file = folder / f'{name}-{split}.array_record-00000-of-00001'
        writer = ArrayRecordWriter(str(file), 'group_size:1')
        for image, label in zip(images, labels, strict=True):
            png, example = io.BytesIO(), proto.Example()
            Image.fromarray(image.squeeze()).save(png, 'PNG')
            example.features.feature['image'].bytes_list.value.append(png.getvalue())
            example.features.feature['label'].int64_list.value.append(int(label))
            writer.write(example.SerializeToString())
        writer.close()
    core = 'tensorflow_datasets.core.features'
    pixels = {'dtype': 'uint8', 'shape': {'dimensions': [str(n) for n in images.shape[1:]]}}
    features = {
        'image': {'pythonClassName': f'{core}.image_feature.Image', 'image': pixels},
        'label': {
            'pythonClassName': f'{core}.class_label_feature.ClassLabel',
            'classLabel': {'numClasses': str(labels.max() + 1)},
        },
    }
    (folder / 'features.json').write_text(
        json.dumps(
            {
                'pythonClassName': f'{core}.features_dict.FeaturesDict',
                'featuresDict': {'features': features},
            }
        )
    )
    splits = [
        {
            'name': split,
            'shardLengths': [str(len(images))],
            'numBytes': '1',
            'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        }
        for split in SPLITS
    ]
    info = {'name': name, 'version': '3.0.2', 'fileFormat': 'array_record', 'splits': splits}
    (folder / 'dataset_info.json').write_text(json.dumps(info))
    return folder


def noise(examples: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (examples, *shape), np.uint8)
    return images, np.arange(examples, dtype=np.int32) % 10


@pytest.mark.parametrize('shape', [(28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize('block', [3, 4096])
def test_every_pixel_and_label_is_read_in_order(tmp_path, monkeypatch, shape, block):
    """Expectation: the arrays that were written, for any block size, grey or colour."""
    monkeypatch.setattr(array_record, '_BLOCK', block)
    images, labels = noise(10, shape)
    write_prepared(tmp_path, 'cifar100', images, labels)
    read_images, read_labels = array_record.read('cifar100', 'test', str(tmp_path))
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels)
    assert read_labels.dtype == np.int32


def cut_shard(folder: Path) -> None:
    file = next(folder.glob('*-test.*'))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def blank_shard(folder: Path) -> None:
    file = next(folder.glob('*-test.*'))
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 3 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 3)
    file.write_bytes(whole)


def lose_shard(folder: Path) -> None:
    next(folder.glob('*-test.*')).unlink()


def cut_description(folder: Path) -> None:
    file = folder / 'dataset_info.json'
    file.write_text(file.read_text()[:40])


def lose_features(folder: Path) -> None:
    (folder / 'features.json').unlink()


def wrong_shape(folder: Path) -> None:
    file = folder / 'features.json'
    file.write_text(file.read_text().replace('"28"', '"14"'))


@pytest.mark.parametrize(
    'damage', [cut_shard, blank_shard, lose_shard, cut_description, lose_features, wrong_shape]
)
def test_damaged_data_is_an_error_that_says_how_to_mend_it(tmp_path, damage):
    """Expectation: one line naming the folder and the command, never fewer or other examples."""
    damage(write_prepared(tmp_path, 'mnist', *noise(50, (28, 28, 1))))
    with pytest.raises(DataError, match='tfds build mnist') as caught:
        array_record.read('mnist', 'test', str(tmp_path))
    assert str(tmp_path / 'mnist' / '3.0.2') in str(caught.value)
    assert '\n' not in str(caught.value)


def test_other_file_formats_are_refused(tmp_path):
    """Expectation: parquet, which TFDS would read as happily, is named and refused."""
    folder = write_prepared(tmp_path, 'mnist', *noise(2, (28, 28, 1)))
    info = folder / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'parquet'))
    with pytest.raises(DataError, match='stored as parquet, not as array_record'):
        array_record.read('mnist', 'test', str(tmp_path))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda images, labels: (images[:-1], labels[:-1]), '59999'),
        (lambda images, labels: (images, labels[:-1]), '59999'),
        (lambda images, labels: (images, labels + 1), 'labels 0 to 9, found 1 to 10'),
        (lambda images, labels: (images, labels.astype(np.int64)), 'int64'),
        (lambda images, labels: (images[..., 0], labels), r'\(60000, 28, 28\)'),
    ],
)
def test_a_set_that_is_not_what_it_should_be_is_an_error(monkeypatch, change, message):
    """Expectation: `FACTS`; a truncated set would otherwise train without a word."""
    images = np.zeros((60_000, 28, 28, 1), np.uint8)
    labels = np.arange(60_000, dtype=np.int32) % 10
    monkeypatch.setattr(array_record, 'read', lambda *_: change(images, labels))
    with pytest.raises(DataError, match=message):
        data.load('mnist')


def test_missing_data_names_the_places_and_the_commands(tmp_path, monkeypatch):
    """Expectation: the order of the places in `find`; the flags of `tfds build --help`."""
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'env'))
    with pytest.raises(DataError) as caught:
        data.load('mnist')
    assert str(caught.value) == (
        f'no prepared mnist in {tmp_path}/env, {tmp_path}/home/tensorflow_datasets; prepare it'
        f" with: pip install 'tensorflow>=2.18' && tfds build mnist --file_format=array_record"
        f' --data_dir={tmp_path}/env'
    )


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    """Expectation: an explicit place alone; else the environment's, then the home's; newest wins;
    a folder TFDS is still writing to is no version."""
    home = tmp_path / 'home' / 'tensorflow_datasets'
    places = {'explicit': tmp_path / 'explicit', 'env': tmp_path / 'env', 'home': home}
    for place in places.values():
        for version in ('3.0.1', '3.0.10', '3.0.9', '3.1.0.incompleteXYZ'):
            folder = place / 'mnist' / version
            folder.mkdir(parents=True)
            (folder / 'dataset_info.json').touch()
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('TFDS_DATA_DIR', str(places['env']))
    newest = 'mnist/3.0.10'
    assert array_record.find('mnist', str(places['explicit'])) == places['explicit'] / newest
    assert array_record.find('mnist') == places['env'] / newest
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'empty'))
    assert array_record.find('mnist') == home / newest
    with pytest.raises(DataError, match='empty;'):
        array_record.find('mnist', str(tmp_path / 'empty'))


def test_reading_needs_no_tensorflow_and_importing_no_tfds(tmp_path):
    """Expectation: the two promises of `array_record`, seen from a fresh interpreter."""
    write_prepared(tmp_path, 'mnist', *noise(3, (28, 28, 1)))
    program = """if True:
        import sys
        import jaxprune.data
        from jaxprune.data import array_record
        jaxprune.data.load('mnist_small')
        assert 'tensorflow_datasets' not in sys.modules
        images, labels = array_record.read('mnist', 'train', sys.argv[1])
        assert images.shape == (3, 28, 28, 1)
        assert 'tensorflow_datasets' in sys.modules
        assert 'tensorflow' not in sys.modules
    """
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, '-c', program, str(tmp_path)], check=True, cwd=root)


# --- orders ----------------------------------------------------------------------------------


@FEW
@given(
    seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10_000), examples=st.integers(1, 40),
    parts=st.integers(1, 6),
)  # fmt: skip
def test_an_epoch_visits_no_example_twice(seed, epoch, examples, parts):
    """Expectation: the definition of a permutation with its remainder dropped."""
    batch = max(1, examples // parts)
    order = np.asarray(data.epoch_order(jax.random.key(seed), epoch, examples, batch))
    assert (order.shape, order.dtype) == ((examples // batch, batch), np.int32)
    assert np.unique(order).size == order.size
    assert order.min() >= 0 and order.max() < examples


@FEW
@given(seed=st.integers(0, 2**31 - 1), epochs=st.tuples(*[st.integers(0, 2**31 - 1)] * 2))
def test_orders_differ_between_epochs_and_repeat_for_the_same(seed, epochs):
    """Expectation: two of 64! orders are equal by chance never."""
    assume(epochs[0] != epochs[1])
    key = jax.random.key(seed)
    first, second = (np.asarray(data.epoch_order(key, e, 64, 8)) for e in epochs)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, data.epoch_order(key, epochs[0], 64, 8))


def test_orders_of_many_runs_are_the_orders_of_each():
    """Expectation: row i of the vmapped, jitted result with a traced epoch is run i's own."""
    keys = jax.random.split(jax.random.key(0), 4)
    many = jax.jit(jax.vmap(lambda key, e: data.epoch_order(key, e, 50, 7), in_axes=(0, None)))
    for key, order in zip(keys, many(keys, 3), strict=True):
        np.testing.assert_array_equal(order, data.epoch_order(key, 3, 50, 7))


@pytest.mark.parametrize('batch', [0, 11])
def test_a_batch_that_cannot_be_filled_is_an_error(batch):
    with pytest.raises(DataError, match=f'batch of {batch} cannot be filled from 10'):
        data.epoch_order(jax.random.key(0), 0, 10, batch)


# --- batches ---------------------------------------------------------------------------------


def split_of_noise(shape: tuple[int, int, int] = (6, 7, 3)) -> data.Split:
    return data.Split(*noise(20, shape))


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit], ids=['plain', 'jit'])
def test_a_batch_is_gathered_scaled_and_normalised(wrap):
    """Expectation: (pixel / 255 - mean) / std in float64, row by row."""
    split, mean, std = split_of_noise(), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    fetch = data.fetcher(mean, std)
    indices = jnp.array([3, 19, 0, 3])
    x, y = wrap(fetch)(data.to_device(split), jax.random.key(0), indices)
    assert (x.dtype, y.dtype) == (jnp.float32, jnp.int32)
    expected = (split.images[np.asarray(indices)].astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(y, split.labels[np.asarray(indices)])


def test_augmentation_comes_before_normalisation():
    """Expectation: white images show pixels (1 - mean) / std and, where padded, (0 - mean) / std:
    black, as in the usual recipes, and not the grey that zeros after normalisation would be."""
    split = data.DeviceSplit(
        jnp.full((16, 8, 8, 1), 255, jnp.uint8), jnp.zeros(16, jnp.int32)
    )  # fmt: skip
    fetch = data.fetcher((0.25,), (0.5,), ('crop', 'flip'))
    x = fetch(split, jax.random.key(0), jnp.arange(16)).x
    np.testing.assert_array_equal(np.unique(x), np.float32([-0.5, 1.5]))


def test_augmented_batches_of_many_runs_are_the_batches_of_each():
    """Expectation: bit for bit, with the data shared and the keys and indices one per run."""
    split = data.to_device(split_of_noise())
    fetch = jax.jit(data.fetcher((0.5,) * 3, (0.25,) * 3, ('crop', 'flip')))
    keys = jax.random.split(jax.random.key(0), 3)
    indices = jax.random.randint(jax.random.key(1), (3, 5), 0, 20)
    many = jax.jit(jax.vmap(fetch, in_axes=(None, 0, 0)))(split, keys, indices)
    for i in range(3):
        one = fetch(split, keys[i], indices[i])
        np.testing.assert_array_equal(many.x[i], one.x)
        np.testing.assert_array_equal(many.y[i], one.y)
    assert not np.array_equal(*(fetch(split, key, indices[0]).x for key in keys[:2]))


def test_moments_of_other_channels_are_refused():
    """Expectation: broadcasting one mean over three channels, or three over one, is a mistake."""
    for moments, shape in (((0.5,), (4, 4, 3)), ((0.5,) * 3, (4, 4, 1))):
        split = data.to_device(split_of_noise(shape))
        with pytest.raises(DataError, match='channels'):
            data.fetcher(moments, moments)(split, jax.random.key(0), jnp.arange(2))


# --- class-balanced draws --------------------------------------------------------------------


@FEW
@given(labels=st.lists(st.integers(0, 3), min_size=4, max_size=60))
def test_the_table_lists_the_first_examples_of_each_class(labels):
    """Expectation: a plain loop over the labels."""
    assume(set(labels) == {0, 1, 2, 3})
    table = data.class_balanced(np.array(labels), 4)
    smallest = min(labels.count(c) for c in range(4))
    expected = [[i for i, label in enumerate(labels) if label == c][:smallest] for c in range(4)]
    assert table.dtype == np.int32
    np.testing.assert_array_equal(table, expected)


@FEW
@given(
    seed=st.integers(0, 2**31 - 1), classes=st.integers(1, 4), per_class=st.integers(1, 3),
    batches=st.integers(1, 3), spare=st.integers(0, 2),
)  # fmt: skip
def test_balanced_batches_are_balanced_and_disjoint(seed, classes, per_class, batches, spare):
    """Expectation: the definition; every class equally often in each batch, no example twice."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(classes), per_class * batches + spare))
    table = data.class_balanced(labels, classes)
    drawn = np.asarray(data.balanced_indices(jax.random.key(seed), table, per_class, batches))
    assert (drawn.shape, drawn.dtype) == ((batches, classes * per_class), np.int32)
    assert np.unique(drawn).size == drawn.size
    for batch in drawn:
        np.testing.assert_array_equal(np.bincount(labels[batch]), [per_class] * classes)


def test_balanced_draws_are_mixed_fresh_and_independent_of_other_runs():
    """Expectation: classes come in no order, keys decide, vmapped runs equal single ones."""
    labels = np.repeat(np.arange(10), 40)
    table = data.class_balanced(labels, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(lambda key: data.balanced_indices(key, table, 5, 4)))(keys)
    for key, drawn in zip(keys, many, strict=True):
        np.testing.assert_array_equal(drawn, data.balanced_indices(key, table, 5, 4))
        assert all(np.any(np.diff(labels[batch]) < 0) for batch in drawn)
    assert not np.array_equal(many[0], many[1])


def test_impossible_draws_are_errors():
    table = data.class_balanced(np.repeat(np.arange(2), 5), 2)
    with pytest.raises(DataError, match=r'3 batches of 2 per class need 6 .* smallest has 5'):
        data.balanced_indices(jax.random.key(0), table, 2, 3)
    with pytest.raises(DataError, match='class 1 has no example'):
        data.class_balanced(np.array([0, 2]), 3)
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(DataError, match='not within 0 to 2'):
            data.class_balanced(np.array(labels), 3)
