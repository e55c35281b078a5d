"""Manifests: golden copies, schemas that refuse unknown keys, odd names, scripts that can be read.

Renew the golden copies after a change: JAXPRUNE_RENEW_GOLDEN=1 pytest -n 0 tests/test_manifests.py
"""

import copy
import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxprune.errors import SpecError
from jaxprune.fleet.manifests import KINDS, ManifestOptions, manifests, templates

GOLDEN = Path(__file__).parent / 'golden' / 'launch'
IMAGE = 'registry.example/jaxprune:1'
BUCKET = 'gs://bucket/lottery'
KUBERNETES = '1.31'
# name of a case -> kind, directory, chunks, options
CASES = {
    'k8s': (
        'k8s',
        '/nfs/sweeps/lottery',
        40,
        ManifestOptions(image=IMAGE, gpus=1, queue='sweeps', claim='nfs', nodes=('pool=a100',)),
    ),
    'k8s_processes': (
        'k8s',
        BUCKET,
        2,
        ManifestOptions(
            image=IMAGE,
            gpus=8,
            processes=2,
            queue='sweeps',
            service_account='sweeps',
            secret='keys',
        ),
    ),
    'tpu': (
        'tpu',
        BUCKET,
        40,
        ManifestOptions(
            image=IMAGE,
            queue='sweeps',
            project='my-project',
            zone='us-central1-a',
            account='sweeps@my-project.iam.gserviceaccount.com',
        ),
    ),
    'tpu_volume': (
        'tpu',
        '/nfs/sweeps/lottery',
        3,
        ManifestOptions(
            image=IMAGE,
            tpu='tpu-v5-lite-podslice',
            topology='2x4',
            claim='nfs',
            mount='/nfs',
            spot=False,
        ),
    ),
    'sky': (
        'sky',
        's3://bucket/lottery',
        40,
        ManifestOptions(gpus=1, gpu_type='A100', infra='aws/us-east-1', cache='s3://bucket/cache'),
    ),
}


def files(case):
    kind, sweep, chunks, options = CASES[case]
    return manifests(kind, sweep, chunks, 'lottery', options)


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document is not None]


def all_documents():
    """Of Kubernetes: SkyPilot's have no kind."""
    for case in CASES:
        for name, text in files(case).items():
            if name.endswith('.yaml'):
                for document in documents(text):
                    if 'kind' in document:
                        yield case, document


def check(document):
    """Refuses unknown keys and wrong types, by the schema of the document's kind."""
    if document['kind'] == 'Job':
        kubernetes_validate = pytest.importorskip(
            'kubernetes_validate', reason='no schemas of Jobs'
        )
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema = pytest.importorskip('jsonschema', reason='nothing that reads schemas')
    api = document['apiVersion'].split('.')[0]
    schema = json.loads((GOLDEN / f'{api}.schema.json').read_text(encoding='utf-8'))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(document)
    if document['kind'] == 'JobSet':
        for job in document['spec']['replicatedJobs']:
            check(
                {
                    'apiVersion': 'batch/v1',
                    'kind': 'Job',
                    'metadata': {'name': 'x'},
                    'spec': job['template']['spec'],
                }
            )


@pytest.mark.parametrize('case', CASES)
def test_files_equal_their_golden_copies(case):
    written = files(case)
    directory = GOLDEN / case
    if os.environ.get('JAXPRUNE_RENEW_GOLDEN'):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name, text in written.items():
            (directory / name).write_text(text, encoding='utf-8')
    golden = {path.name: path.read_text(encoding='utf-8') for path in directory.iterdir()}
    assert written == golden


def test_all_kinds_and_templates_have_a_golden_copy():
    assert {kind for kind, *_ in CASES.values()} == set(KINDS)
    names = {path.name.removesuffix('.j2') for path in templates().rglob('*.j2')}
    assert names - {name for case in CASES for name in files(case)} == {'pod.yaml'}


@pytest.mark.parametrize('case', CASES)
def test_documents_fit_their_schemas(case):
    found = [document for of, document in all_documents() if of == case]
    assert bool(found) == (case != 'sky')
    for document in found:
        check(document)


def keys(document, path=()):
    """The path of every key that a schema should know."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    free = {'labels', 'annotations', 'nodeSelector', 'matchLabels', 'nodeLabels'}
    free |= {'requests', 'limits'}
    for key, value in pairs:
        if isinstance(document, dict):
            yield (*path, key)
        if isinstance(value, dict | list) and key not in free:
            yield from keys(value, (*path, key))


@pytest.mark.parametrize('kind', ['Job', 'JobSet', 'ResourceFlavor', 'ClusterQueue', 'LocalQueue'])
def test_a_misspelt_key_is_refused(kind):
    case = 'tpu' if kind == 'ResourceFlavor' else 'k8s_processes' if kind == 'JobSet' else 'k8s'
    document = next(d for of, d in all_documents() if of == case and d['kind'] == kind)
    check(document)
    for *outer, last in keys(document):
        if not outer and last in ('apiVersion', 'kind'):
            continue
        wrong = copy.deepcopy(document)
        inner = wrong
        for key in outer:
            inner = inner[key]
        inner[f'{last}x'] = inner.pop(last)
        with pytest.raises(Exception) as error:
            check(wrong)
        assert type(error.value).__name__ == 'ValidationError', (outer, last, error.value)


def failure_rules(spec):
    return [
        (
            rule['action'],
            rule.get('onExitCodes', {}).get('values') or rule['onPodConditions'][0]['type'],
        )
        for rule in spec['podFailurePolicy']['rules']
    ]


@pytest.mark.parametrize('case', ['k8s', 'tpu', 'tpu_volume'])
def test_jobs_say_what_exit_codes_mean(case):
    """Values that schemas leave open, and rules of the API that they do not hold."""
    [job] = documents(files(case)['job.yaml'])
    spec, (_, _, chunks, options) = job['spec'], CASES[case]
    assert failure_rules(spec) == [
        ('Ignore', 'DisruptionTarget'),
        ('Ignore', [75]),
        ('FailIndex', [2]),
    ]
    assert spec['completionMode'] == 'Indexed' and spec['podReplacementPolicy'] == 'Failed'
    assert spec['completions'] == chunks and spec['parallelism'] == min(chunks, options.parallelism)
    assert spec['maxFailedIndexes'] <= chunks and 'backoffLimit' not in spec
    pod = spec['template']['spec']
    assert pod['restartPolicy'] == 'Never'
    [container] = pod['containers']
    assert container['command'][3:] == ['--index', '$(JOB_COMPLETION_INDEX)', '--grace', '25']
    assert all(
        rule['onExitCodes']['containerName'] == container['name']
        for rule in spec['podFailurePolicy']['rules']
        if 'onExitCodes' in rule
    )
    assert spec.get('suspend', False) == bool(options.queue)


def test_processes_of_a_chunk_find_each_other_and_restart_together():
    jobsets = documents(files('k8s_processes')['jobset.yaml'])
    assert [jobset['metadata']['name'] for jobset in jobsets] == ['lottery-0', 'lottery-1']
    for chunk, jobset in enumerate(jobsets):
        [job] = jobset['spec']['replicatedJobs']
        spec = job['template']['spec']
        assert spec['completions'] == spec['parallelism'] == 2 and spec['backoffLimit'] == 0
        assert failure_rules(spec) == [('FailJob', 'DisruptionTarget'), ('FailJob', [75])]
        [container] = spec['template']['spec']['containers']
        assert container['command'][3:5] == ['--index', str(chunk)]
        name, variables = jobset['metadata']['name'], {v['name']: v for v in container['env']}
        address = variables['JAX_COORDINATOR_ADDRESS']['value']
        assert address == f'{name}-{job["name"]}-0-0.{name}:8476'
        assert variables['JAX_NUM_PROCESSES']['value'] == '2'


def test_a_queue_has_room_for_all_that_run_at_a_time():
    _, queue, _ = documents(files('k8s_processes')['queue.yaml'])
    [group] = queue['spec']['resourceGroups']
    [flavor] = group['flavors']
    quotas = {entry['name']: entry['nominalQuota'] for entry in flavor['resources']}
    # 2 chunks of 2 processes: 4 pods
    assert quotas == {'cpu': '16', 'memory': '64Gi', 'nvidia.com/gpu': '32'}
    assert group['coveredResources'] == list(quotas)


ODD = [
    "/nfs/a sweep/it's",
    '/nfs/x: y # "z"',
    '/nfs/$(HOME)/`id`/$HOME',
    '/nfs/{{ image }}/%}',
    '/nfs/- [a], &b *c !d',
    '/nfs/Größe/消/🙂',
    '/nfs/back\\slash',
    '/nfs/true',
]


def strings(document):
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict | list):
        for inner in document.values() if isinstance(document, dict) else document:
            yield from strings(inner)


@pytest.mark.parametrize('sweep', ODD)
def test_odd_directories_come_through_whole(sweep):
    options = ManifestOptions(image=IMAGE, claim='nfs', mount='/nfs', queue='sweeps')
    for processes in (1, 2):
        changed = dataclasses.replace(options, processes=processes)
        for name, text in manifests('k8s', sweep, 1, 'lottery', changed).items():
            for document in documents(text):
                check(document)
                if name != 'queue.yaml':
                    assert document['metadata']['annotations']['jaxprune/sweep'] == sweep
                    # Kubernetes reads `$$` as `$`.
                    assert sweep.replace('$', '$$') in set(strings(document))


MISTAKES = [
    ('kubernetes', BUCKET, 1, 'a', {}, 'did you mean|valid: k8s, sky, tpu'),
    ('k8s', BUCKET, 0, 'a', {}, 'chunks: .* the nearest is 1'),
    ('k8s', BUCKET, 1, 'My Sweep: 1', {}, "name: .* use 'my-sweep-1'"),
    ('k8s', BUCKET, 1, '10-seeds', {}, "use 'sweep-10-seeds'"),
    ('k8s', BUCKET, 1, '???', {}, "use 'sweep'"),
    ('k8s', BUCKET, 1000, 'a' * 63, {}, f"at most 59 .* use '{'a' * 59}'"),
    ('tpu', BUCKET, 1000, 'a' * 40, {}, f"use '{'a' * 36}'"),
    ('k8s', BUCKET, 1, 'a\n', {}, 'name'),
    ('k8s', 'runs/lottery', 1, 'a', {'claim': 'nfs'}, 'DIR: .* absolute'),
    ('k8s', '/nfs/../etc', 1, 'a', {'claim': 'nfs'}, 'DIR'),
    ('k8s', '/nfs/a\nb', 1, 'a', {'claim': 'nfs'}, 'DIR: .* printed'),
    ('k8s', '/nfs/a\x85b', 1, 'a', {'claim': 'nfs'}, 'DIR: .* printed'),
    ('k8s', 'gs://bucket/a b', 1, 'a', {}, 'DIR: .* write it like'),
    ('k8s', 'gs://bucket/$(id)', 1, 'a', {}, 'DIR'),
    ('k8s', 'gcs://bucket/a', 1, 'a', {}, "did you mean 'gs'"),
    ('k8s', '/nfs/a', 1, 'a', {}, 'claim: name'),
    ('k8s', '/a', 1, 'a', {'claim': 'nfs'}, 'mount'),
    ('k8s', '/nfs/a', 1, 'a', {'claim': 'nfs', 'mount': '/scratch'}, "mount: .* use '/nfs'"),
    ('k8s', '/nfs/a:b/c', 1, 'a', {'claim': 'nfs'}, 'mount'),
    ('k8s', BUCKET, 1, 'a', {'claim': 'nfs'}, 'claim: leave out'),
    ('k8s', BUCKET, 1, 'a', {'image': ''}, 'image: k8s needs'),
    ('k8s', BUCKET, 1, 'a', {'image': 'x y'}, 'image'),
    ('k8s', BUCKET, 1, 'a', {'memory': '16GB'}, "memory: .* '16Gi'"),
    ('k8s', BUCKET, 1, 'a', {'memory': 16}, "memory: .* '16Gi'"),
    ('k8s', BUCKET, 1, 'a', {'cpus': 0}, 'cpus: .* the nearest is 1'),
    ('k8s', BUCKET, 1, 'a', {'cpus': True}, 'cpus: must be an integer'),
    ('k8s', BUCKET, 1, 'a', {'spot': 'no'}, 'spot'),
    ('k8s', BUCKET, 1, 'a', {'nodes': ('pool a100',)}, 'nodes'),
    ('k8s', BUCKET, 1, 'a', {'queue': 'My Queue'}, "queue: .* use 'my-queue'"),
    ('k8s', BUCKET, 1, 'a', {'processes': 2}, 'queue: '),
    ('k8s', BUCKET, 1, 'a', {'package': ''}, 'package'),
    ('tpu', BUCKET, 1, 'a', {'tpu': 'tpu-v6e'}, "did you mean 'tpu-v6e-slice'"),
    ('tpu', BUCKET, 1, 'a', {'topology': '4x4'}, 'valid: 1x1, 2x2, 2x4'),
    ('tpu', BUCKET, 1, 'a', {'processes': 4}, 'processes: tpu'),
    ('tpu', BUCKET, 1, 'a', {'gpus': 1}, 'gpus'),
    ('tpu', BUCKET, 1, 'a', {'zone': 'x; rm -rf /'}, 'zone'),
    ('sky', '/nfs/a', 1, 'a', {}, 'sky: the sweep must be in a bucket'),
    ('sky', BUCKET, 1, 'a', {'gpus': 1}, 'gpu_type'),
    ('sky', BUCKET, 1, 'a', {'package': '$(id)'}, 'package'),
]


@pytest.mark.parametrize(('kind', 'sweep', 'chunks', 'name', 'changes', 'message'), MISTAKES)
def test_each_mistake_is_named_in_one_line(kind, sweep, chunks, name, changes, message):
    options = ManifestOptions(**{'image': IMAGE, **changes})
    with pytest.raises(SpecError, match=message) as error:
        manifests(kind, sweep, chunks, name, options)
    assert len(str(error.value).splitlines()) == 1


def test_every_option_is_described():
    # Python 3.13 keeps docstrings without their indentation.
    described = re.findall(r'^  (\w+):', inspect.cleandoc(ManifestOptions.__doc__), re.M)
    assert described == [field.name for field in dataclasses.fields(ManifestOptions)]


def scripts():
    return {
        f'{case}/{name}': text
        for case in CASES
        for name, text in files(case).items()
        if name.endswith('.sh')
    }


@pytest.mark.parametrize('script', scripts())
def test_scripts_can_be_read_by_bash(script, tmp_path):
    path = tmp_path / 'script.sh'
    path.write_text(scripts()[script], encoding='utf-8')
    subprocess.run(['bash', '-n', path], check=True)
    if shutil.which('shellcheck'):
        subprocess.run(['shellcheck', path], check=True)


@pytest.mark.parametrize(
    ('codes', 'attempts', 'deleted'),
    [([75, 1, 0], 3, True), ([2], 1, True), ([1, 1, 1, 1, 1], 4, True)],
)
def test_a_tpu_machine_tries_again_and_deletes_itself(codes, attempts, deleted, tmp_path):
    """The script of the machine, with stand-ins for all that it calls."""
    stand_in(tmp_path / 'home' / 'bin' / 'jaxprune', CODES_IN_TURN, tmp_path, codes)
    for command in ('sleep', 'gcloud'):
        stand_in(tmp_path / 'bin' / command, f'echo {command} "$@" >> "$HERE/calls"', tmp_path)
    stand_in(tmp_path / 'bin' / 'curl', 'echo "a/b/${*##*/}"', tmp_path)
    assert run_startup(tmp_path).returncode == 0
    assert len((tmp_path / 'attempts').read_text().splitlines()) == attempts
    assert ('queued-resources delete' in (tmp_path / 'calls').read_text()) == deleted


def test_a_preempted_tpu_machine_waits_for_its_chunk_and_stays(tmp_path):
    body = """trap 'echo saved >> "$HERE/attempts"; exit 75' TERM
    kill -TERM $PPID
    for _ in $(seq 100); do sleep 0.05; done"""
    stand_in(tmp_path / 'home' / 'bin' / 'jaxprune', body, tmp_path)
    stand_in(tmp_path / 'bin' / 'gcloud', 'touch "$HERE/calls"', tmp_path)
    assert run_startup(tmp_path).returncode == 0
    assert (tmp_path / 'attempts').read_text() == 'saved\n'
    assert not (tmp_path / 'calls').exists()


def test_tpu_machines_need_no_image():
    written = manifests('tpu', BUCKET, 1, 'a', ManifestOptions(queue='sweeps'))
    assert set(written) == {'queued_resources.sh', 'startup.sh'}
    with pytest.raises(SpecError, match='image: tpu needs'):
        manifests('tpu', 's3://bucket/lottery', 1, 'a', ManifestOptions())


def test_xpk_is_left_out_where_its_slices_are_not_one_machine():
    options = ManifestOptions(image=IMAGE, topology='2x4')
    assert 'xpk.sh' in manifests('tpu', BUCKET, 1, 'a', ManifestOptions(image=IMAGE))
    assert 'xpk.sh' not in manifests('tpu', BUCKET, 1, 'a', options)


CODES_IN_TURN = """
echo "$@" >> "$HERE/attempts"
codes=($CODES)
exit "${codes[$(($(wc -l < "$HERE/attempts") - 1))]}"
"""


def stand_in(path, body, here, codes=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    known = f'HERE={shlex.quote(str(here))}\nCODES={shlex.quote(" ".join(map(str, codes)))}\n'
    path.write_text(f'#!/usr/bin/env bash\n{known}{body}\n', encoding='utf-8')
    path.chmod(0o755)


def run_startup(here):
    script = files('tpu')['startup.sh']
    script = script.replace('/opt/jaxprune', str(here / 'home'))
    script = script.replace('/var/log/jaxprune.log', str(here / 'log'))
    (here / 'startup.sh').write_text(script, encoding='utf-8')
    environment = {**os.environ, 'PATH': f'{here / "bin"}:{os.environ["PATH"]}'}
    return subprocess.run(['bash', here / 'startup.sh'], env=environment, timeout=60, check=False)
