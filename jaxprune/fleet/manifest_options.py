"""What manifests need to know of the machines: the options of `jaxprune launch`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ManifestOptions:
    """What the machines are, and how often a chunk is tried.

    Attributes:
      image: container image with jaxprune, such as `registry/jaxprune:1`. Only TPU virtual machines
        and SkyPilot need none; tpu without one leaves out the files for GKE.
      cpus: cores of a chunk, or of each of its processes.
      memory: main memory of a chunk, or of each of its processes, such as 16Gi.
      gpus: GPUs of a chunk, or of each of its processes.
      gpu_type: SkyPilot's name of the GPU, such as A100; sky needs it where gpus are asked for.
      tpu: GKE's name of the TPU.
      topology: chips of a TPU host, such as 2x2; empty: four chips.
      parallelism: chunks that run at a time; on TPU virtual machines and by SkyPilot, machines.
      retries: how often a chunk is started again after a fault; interruptions do not count.
      max_failed: chunks that may fail before the Job ends; empty: a tenth, at least one.
      grace: seconds after SIGTERM in which a chunk waits for the end of an epoch, to save there.
        Pods get 35 seconds more, to save and to end.
      spot: run on machines that may be preempted.
      queue: Kueue's LocalQueue; empty: start at once. Chunks of several processes need one.
      namespace: of Kubernetes.
      claim: PersistentVolumeClaim that holds the sweep; not for a sweep in a bucket.
      mount: directory where the claim is mounted, above the sweep; empty: the sweep's parent.
      cache: directory or bucket for compiled programs; empty: on the claim, or on the machine.
      nodes: labels of the nodes to run on, each `key=value`.
      service_account: ServiceAccount of Kubernetes that may read and write the bucket.
      account: e-mail address of Google's service account for TPU virtual machines; empty: the
        project's default.
      secret: Secret of Kubernetes whose entries become environment variables, such as keys for S3.
      processes: of a chunk, each a pod, joined by `jax.distributed`; more than one makes JobSets.
      port: where process 0 of a chunk listens.
      package: what pip installs on machines without an image.
      project: of Google Cloud; empty: gcloud's own.
      zone: of Google Cloud; empty: gcloud's own.
      infra: where SkyPilot looks for machines, such as gcp/us-central1; empty: everywhere.
    """

    image: str = ''
    cpus: int = 4
    memory: str = '16Gi'
    gpus: int = 0
    gpu_type: str = ''
    tpu: str = 'tpu-v6e-slice'
    topology: str = ''
    parallelism: int = 4
    retries: int = 3
    max_failed: int | None = None
    grace: int = 25
    spot: bool = True
    queue: str = ''
    namespace: str = 'default'
    claim: str = ''
    mount: str = ''
    cache: str = ''
    nodes: tuple[str, ...] = ()
    service_account: str = ''
    account: str = ''
    secret: str = ''
    processes: int = 1
    port: int = 8476
    package: str = 'jaxprune[cloud]'
    project: str = ''
    zone: str = ''
    infra: str = ''
