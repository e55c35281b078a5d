"""Files that run the chunks of a sweep on Kubernetes, on TPUs and by SkyPilot.

The templates have no quotation marks: the environment quotes every value, for YAML or for a shell.
None of these files was ever run on a live cluster; tests check them against schemas.
"""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jinja2

from jaxprune.errors import SpecError, check_choice, quoted, shown
from jaxprune.fleet.launcher import SAVING
from jaxprune.fleet.manifest_options import ManifestOptions

KINDS = ('k8s', 'tpu', 'sky')
#: Kubernetes allows an Indexed Job as many.
_MOST_CHUNKS = 100_000
_MEBIBYTES = {'Mi': 1, 'Gi': 2**10, 'Ti': 2**20}
#: Nodes with these taints are for pods that may be preempted.
_SPOT_TAINTS = (
    ('cloud.google.com/gke-spot', 'true'),
    ('kubernetes.azure.com/scalesetpriority', 'spot'),
)
#: xpk counts preemptions as restarts, so a few are not enough.
_XPK_RESTARTS = 100
_XPK_NAME = 40
#: With room for the numbers of pods and machines.
_SHORT_NAME = 30
#: Slices of one machine by xpk's count; its slices of eight chips are two machines.
_XPK_TYPES = ('v4-8', 'v5p-8', 'v6e-1', 'v6e-4')


class _Tpu(NamedTuple):
    """TPUs of a generation, on one host.

    Attributes:
      runtime: software of a TPU virtual machine.
      hosts: topology -> (chips, type of the virtual machine).
    """

    runtime: str
    hosts: dict[str, tuple[int, str]]


#: By the names of GKE. A chunk has one host, so larger slices are not here.
_TPUS = {
    'tpu-v4-podslice': _Tpu('tpu-ubuntu2204-base', {'2x2x1': (4, 'v4-8')}),
    'tpu-v5-lite-podslice': _Tpu(
        'v2-alpha-tpuv5-lite',
        {'1x1': (1, 'v5litepod-1'), '2x2': (4, 'v5litepod-4'), '2x4': (8, 'v5litepod-8')},
    ),
    'tpu-v5p-slice': _Tpu('v2-alpha-tpuv5', {'2x2x1': (4, 'v5p-8')}),
    'tpu-v6e-slice': _Tpu(
        'v2-alpha-tpuv6e', {'1x1': (1, 'v6e-1'), '2x2': (4, 'v6e-4'), '2x4': (8, 'v6e-8')}
    ),
}


def manifests(
    kind: str, sweep: str, chunks: int, name: str, options: ManifestOptions
) -> dict[str, str]:
    """Files that run all chunks of a sweep elsewhere.

    Args:
      kind: `k8s` for Kubernetes, `tpu` for TPUs of Google Cloud, `sky` for SkyPilot.
      sweep: directory of the sweep as the machines see it: absolute, `gs://...` or `s3://...`.
      chunks: of the frozen plan.
      name: of the Job; others are made from it.
      options: the rest.

    Returns:
      File name -> text.

    Raises:
      SpecError: if an option is missing, wrong, or fits neither the kind nor the directory.
    """
    check_choice('kind of manifests', kind, KINDS, SpecError)
    _check_options(options)
    _check_number('chunks', chunks, 1, _MOST_CHUNKS)
    bucket = _check_sweep(sweep)
    _check_name('name', name, _longest_name(kind, chunks, options))
    _check_kind(kind, sweep, bucket, options)
    values = _values(kind, sweep, chunks, name, options)
    if kind == 'sky':
        sources = {file: f'sky/{file}.j2' for file in ('job.yaml', 'launch.sh')}
        return {file: _render(source, values) for file, source in sources.items()}
    sources = {}
    if options.image:
        main = 'jobset.yaml' if options.processes > 1 else 'job.yaml'
        sources[main] = f'{kind}/{main}.j2'
        if options.queue:
            sources['queue.yaml'] = 'k8s/queue.yaml.j2'
    if kind == 'tpu' and sweep.startswith('gs://'):
        scripts = ['queued_resources.sh', 'startup.sh']
        if options.image and values['tpu_vm'] in _XPK_TYPES:
            scripts.append('xpk.sh')
        sources |= {file: f'tpu/{file}.j2' for file in scripts}
    return {file: _render(source, values) for file, source in sources.items()}


def name_of(sweep: str) -> str:
    """A name for the Job of a sweep that every kind allows."""
    return _nearest_name(sweep, _SHORT_NAME)


def templates() -> Path:
    """The directory of templates: in the installed package, or in a checkout `launch`."""
    installed = Path(__file__).with_name('templates')
    return installed if installed.is_dir() else Path(__file__).parents[2] / 'launch'


def _render(template: str, values: dict[str, Any]) -> str:
    quote = _shell_quoted if template.endswith('.sh.j2') else _yaml_quoted
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates()),
        undefined=jinja2.StrictUndefined,
        finalize=quote,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(template).render(values)


def _yaml_quoted(value: Any) -> str:
    # JSON of printable text is YAML. `_check_text` let no other text in.
    return json.dumps(value, ensure_ascii=False)


def _shell_quoted(value: Any) -> str:
    return shlex.quote(str(value))


def _values(
    kind: str, sweep: str, chunks: int, name: str, options: ManifestOptions
) -> dict[str, Any]:
    """All that the templates name."""
    nodes = [tuple(node.split('=', 1)) for node in options.nodes]
    requests = [('cpu', str(options.cpus)), ('memory', options.memory)]
    tolerations = list(_SPOT_TAINTS) if options.spot else []
    values: dict[str, Any] = {}
    if kind == 'tpu':
        topology, chips, values['tpu_vm'] = _tpu_host(options)
        values['runtime'] = _TPUS[options.tpu].runtime
        nodes.append(('cloud.google.com/gke-tpu-accelerator', options.tpu))
        nodes.append(('cloud.google.com/gke-tpu-topology', topology))
        if options.spot:
            nodes.append(_SPOT_TAINTS[0])
            tolerations = [_SPOT_TAINTS[0]]
        tolerations.append(('google.com/tpu', ''))
        requests.append(('google.com/tpu', str(chips)))
    elif options.gpus:
        tolerations.append(('nvidia.com/gpu', ''))
        requests.append(('nvidia.com/gpu', str(options.gpus)))
    parallelism = options.parallelism if kind == 'sky' else min(options.parallelism, chunks)
    mount = _mount(sweep, options) if options.claim else ''
    # Kubernetes replaces `$(NAME)` in arguments and variables; a doubled `$` stands for itself.
    cache = options.cache or (f'{mount}/.jaxprune-compiled' if mount else '').replace('$', '$$')
    tenth = max(1, chunks // 10)
    return {
        **asdict(options),
        **values,
        'sweep': sweep,
        'sweep_argument': sweep.replace('$', '$$'),
        'command': f'jaxprune chunk {shlex.quote(sweep)} --all --grace {options.grace}',
        'pod_grace': options.grace + SAVING,
        'chunks': chunks,
        'name': name,
        'index': '$(JOB_COMPLETION_INDEX)',
        'coordinator': '',
        'nodes': nodes,
        'tolerations': tolerations,
        'requests': requests,
        'quotas': [
            (resource, _times(quantity, parallelism * options.processes))
            for resource, quantity in requests
        ],
        'parallelism': parallelism,
        'max_failed': tenth if options.max_failed is None else min(options.max_failed, chunks),
        'mount': mount,
        'cache': cache,
        # JAX itself can keep programs in a bucket, for machines of one kind.
        'cache_variable': 'JAX_COMPILATION_CACHE_DIR' if '://' in cache else 'JAXPRUNE_CACHE_DIR',
        'gigabytes': -(-_mebibytes(options.memory) // 2**10),
        'jax': 'jax[cuda12]' if options.gpus else 'jax',
        'xpk_restarts': _XPK_RESTARTS,
    }


def _check_kind(kind: str, sweep: str, bucket: bool, options: ManifestOptions) -> None:
    """What only some kinds need or can do."""
    if kind == 'sky':
        if not bucket:
            raise SpecError("sky: the sweep must be in a bucket, such as 'gs://bucket/sweep'")
        if options.gpus and not options.gpu_type:
            raise SpecError("gpu_type: name the GPU for SkyPilot, such as 'A100'")
    elif not options.image and not (kind == 'tpu' and sweep.startswith('gs://')):
        raise SpecError(f"image: {kind} needs a container image, such as 'registry/jaxprune:1'")
    if kind != 'k8s' and options.processes > 1:
        raise SpecError(f'processes: {kind} runs a chunk as 1 process, not {options.processes}')
    if options.processes > 1 and not options.queue:
        raise SpecError(
            "queue: processes of a chunk start together, so name a queue of Kueue, such as 'sweeps'"
        )
    if bucket and options.claim:
        raise SpecError(f'claim: leave out {quoted(options.claim)}: the sweep is in a bucket')
    if kind != 'sky' and not bucket and not options.claim:
        raise SpecError(
            'claim: name the PersistentVolumeClaim that holds the sweep, or use a bucket'
        )
    if kind == 'tpu':
        _tpu_host(options)
        if options.gpus:
            raise SpecError(f'gpus: must be 0 for tpu, not {options.gpus}')


def _check_options(options: ManifestOptions) -> None:
    """What holds for all kinds."""
    for option, least, most in (
        ('cpus', 1, 1024),
        ('gpus', 0, 64),
        ('parallelism', 1, 10_000),
        ('retries', 0, 1000),
        ('grace', 1, 86_400),
        ('processes', 1, 10_000),
        ('port', 1, 65_535),
    ):
        _check_number(option, getattr(options, option), least, most)
    if options.max_failed is not None:
        _check_number('max_failed', options.max_failed, 0, _MOST_CHUNKS)
    if not isinstance(options.spot, bool):
        raise SpecError(f'spot: must be true or false, not {shown(options.spot)}')
    if not isinstance(options.memory, str) or not re.fullmatch(
        r'[1-9]\d*(Mi|Gi|Ti)', options.memory
    ):
        number = re.match(r'[1-9]\d*', str(options.memory))
        proposal = f'{number.group() if number else 16}Gi'
        raise SpecError(
            f"memory: {shown(options.memory)} is no size: use Mi, Gi or Ti, '{proposal}'"
        )
    _check_name('namespace', options.namespace, 63)
    for option in ('queue', 'claim', 'secret', 'service_account'):
        if getattr(options, option):
            _check_name(option, getattr(options, option), 63)
    for option, pattern, example in (
        ('image', r'[\w./:@-]+', 'registry/jaxprune:1'),
        ('gpu_type', r'[\w-]+', 'A100'),
        ('topology', r'\d+(x\d+)*', '2x2'),
        ('account', r'[a-z0-9][\w.-]*@[\w.-]+', 'sweeps@my-project.iam.gserviceaccount.com'),
        ('project', r'[a-z][a-z0-9.:-]*', 'my-project'),
        ('zone', r'[a-z0-9-]+', 'us-central1-a'),
        ('infra', r'[\w./*-]+', 'gcp/us-central1'),
        ('cache', r'(gs://|s3://|/)[\w./@=+~-]*', '/sweeps/compiled'),
        ('package', r'[\w./:@=+~<>,!\[\]%#&?-][\w ./:@=+~<>,!\[\]%#&?-]*', 'jaxprune'),
    ):
        value = getattr(options, option)
        if value != '' and not (isinstance(value, str) and re.fullmatch(pattern, value, re.A)):
            raise SpecError(f"{option}: cannot use {quoted(value)}; write it like '{example}'")
    if not options.package:
        raise SpecError("package: name what pip installs, such as 'jaxprune'")
    for node in options.nodes:
        _check_label(node)


def _check_label(node: object) -> None:
    word = r'[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?'
    pattern = rf'([a-z0-9][a-z0-9.-]{{0,252}}/)?{word}=({word})?'
    if not isinstance(node, str) or not re.fullmatch(pattern, node, re.A):
        raise SpecError(f"nodes: {quoted(node)} is no label; write it like 'pool=gpu'")


def _check_number(option: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SpecError(f'{option}: must be an integer, not {shown(value)}')
    if not least <= value <= most:
        raise SpecError(
            f'{option}: must be from {least} to {most}, not {shown(value)}; '
            f'the nearest is {min(max(value, least), most)}'
        )


def _check_name(option: str, name: object, longest: int) -> None:
    """Kubernetes, Google Cloud and xpk all allow such a name."""
    pattern = r'[a-z]([-a-z0-9]*[a-z0-9])?'
    if isinstance(name, str) and len(name) <= longest and re.fullmatch(pattern, name):
        return
    raise SpecError(
        f'{option}: {quoted(name)} is no name of at most {longest} lower-case letters, digits '
        f"and '-'; use '{_nearest_name(str(name), longest)}'"
    )


def _nearest_name(name: str, longest: int) -> str:
    words = re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')
    if not words[:1].isalpha():
        words = f'sweep-{words}'
    return words[:longest].strip('-')


def _longest_name(kind: str, chunks: int, options: ManifestOptions) -> int:
    """Names of pods end in numbers, and have at most 63 characters."""
    if kind == 'tpu':
        return _XPK_NAME - len(f'-{max(chunks, options.parallelism) - 1}')
    if options.processes > 1:
        return 63 - len(f'-{chunks - 1}-p-0-{options.processes - 1}-abcde')
    return 63 - len(f'-{max(chunks, options.parallelism) - 1}')


def _check_sweep(sweep: object) -> bool:
    """Whether the directory is in a bucket."""
    if not isinstance(sweep, str) or not sweep:
        raise SpecError(f"DIR: must be a directory or a bucket's, not {shown(sweep)}")
    if '://' in sweep:
        scheme = sweep.split('://')[0]
        check_choice('kind of bucket', scheme, ('gs', 's3'), SpecError)
        if not re.fullmatch(r'..://[a-z0-9][a-z0-9._-]*(/[\w.=+@~-]+)*', sweep, re.A):
            raise SpecError(
                f'DIR: {quoted(sweep)} has empty parts or other characters than letters, digits '
                "and '._=+@~-'; write it like 'gs://bucket/sweep'"
            )
        return True
    path = PurePosixPath(sweep)
    if not sweep.isprintable():
        raise SpecError(f'DIR: {shown(sweep)} has characters that cannot be printed')
    if not path.is_absolute() or '..' in path.parts or str(path) != sweep or sweep == '/':
        raise SpecError(f"DIR: {quoted(sweep)} is no absolute path without '..', '//' and end '/'")
    return False


def _mount(sweep: str, options: ManifestOptions) -> str:
    """Where the claim is mounted."""
    mount = options.mount or str(PurePosixPath(sweep).parent)
    if mount == '/' or not mount.startswith('/') or not mount.isprintable() or ':' in mount:
        raise SpecError(
            f'mount: cannot mount a claim at {quoted(mount)}; use a directory above the sweep '
            "without ':', such as '/sweeps'"
        )
    mount = str(PurePosixPath(mount))
    if not PurePosixPath(sweep).is_relative_to(mount):
        parent = PurePosixPath(sweep).parent
        raise SpecError(f"mount: {quoted(mount)} is not above {quoted(sweep)}; use '{parent}'")
    return mount


def _tpu_host(options: ManifestOptions) -> tuple[str, int, str]:
    """Topology, chips and type of the virtual machine of one host."""
    check_choice('tpu', options.tpu, _TPUS, SpecError)
    hosts = _TPUS[options.tpu].hosts
    four = next(topology for topology, (chips, _) in hosts.items() if chips == 4)
    topology = options.topology or four
    check_choice(f'topology of one host of {options.tpu}', topology, hosts, SpecError)
    return topology, *hosts[topology]


def _mebibytes(memory: str) -> int:
    return int(memory[:-2]) * _MEBIBYTES[memory[-2:]]


def _times(quantity: str, count: int) -> str:
    """A quantity of Kubernetes, `count` times."""
    number = re.match(r'\d+', quantity).group()
    return f'{int(number) * count}{quantity[len(number) :]}'
