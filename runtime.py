"""The process: its ranks, device, process group, logging, signals and exit code."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from args import ConfigError

log = logging.getLogger("clm")

LOCK_FILE = "run.lock"
ALONE_AFTER_S = 10.0  # a refused rank takes itself for the only one: ranks get there seconds apart

EXIT_OK, EXIT_ERROR, EXIT_CONFIG, EXIT_OOM, EXIT_NAN = 0, 1, 2, 3, 4

# (package, oldest tested, newest tested); ColossalAI's patches in colossal_ext hold for one release only.
TESTED_VERSIONS = (("torch", "2.11", "2.13"), ("transformers", "5.18", "5.23"), ("colossalai", "0.5.0", "0.5.0"))


class RankFailure(RuntimeError):
    """Something that stops this rank, and with it the run, and that one sentence explains. Exit code 1."""


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) inside the block into one sentence about `what`.

    Raises:
        RankFailure: the others may wait for this rank in a collective: the process must end at once.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RankFailure(f"{what} could not be written: {error}") from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock an output folder, made if need be, while the block lasts or until the process ends, however it ends.

    Where the file system has no locks, or cannot be written, there is a warning in its place.

    Raises:
        ConfigError: a live run has the folder.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / LOCK_FILE, "a", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        except BlockingIOError:
            raise ConfigError(_in_use(folder)) from None
        except OSError as error:
            log.warning(f"{folder}: cannot be locked ({error}); see to it that no other run uses it")
        yield


def lock_problem(folder: Path) -> str | None:
    """Return what is wrong with an output folder that a live run has locked. Any number of ranks may ask at once."""
    try:
        with open(folder / LOCK_FILE, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _in_use(folder)
    except OSError:  # no such folder, or no locks
        return None
    return None


def _in_use(folder: Path) -> str:
    holder = (folder / LOCK_FILE).read_text(encoding="utf-8")
    return (
        f"--output_dir {folder}: in use by a run that is still alive ({holder}); end that one, or choose another folder"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a GPU, or the host that rehearses for one, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


@dataclass(frozen=True)
class Runtime:
    """Where this process stands among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    num_gpus: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def device_name(self) -> str:
        return "cpu" if self.on_cpu else torch.cuda.get_device_name(self.device)

    @property
    def device_memory_gib(self) -> float | None:
        """Memory of this rank's GPU in GiB, None on a CPU."""
        return None if self.on_cpu else torch.cuda.get_device_properties(self.device).total_memory / 2**30

    @property
    def has_bf16(self) -> bool:
        """Whether the device computes in bf16 (GPUs before Ampere emulate it, slowly)."""
        return self.on_cpu or torch.cuda.get_device_capability(self.device) >= (8, 0)


def process_age_s() -> float:
    """Return the seconds since the operating system started this process."""
    return time.time() - psutil.Process().create_time()


def current_runtime() -> Runtime:
    """Return the ranks that torchrun set (a plain `python train_clm.py` is a world of one) and the device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Runtime(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=local_rank,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        device=torch.device("cuda", local_rank) if num_gpus else torch.device("cpu"),
        num_gpus=num_gpus,
    )


def start_process_group(runtime: Runtime, *, timeout_s: int, allocator_bytes: float | None = None) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs, through a free port when torchrun is absent.

    Args:
        timeout_s: seconds a collective may wait for another rank.
        allocator_bytes: what tensors may take of this rank's GPU; None: all of it.
    """
    if dist.is_initialized():  # several runs in one process
        return
    if "MASTER_ADDR" not in os.environ:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        rendezvous: dict[str, Any] = {"store": store, "rank": 0, "world_size": 1}
    elif restarts() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps the store, with the addresses of the ranks that are gone (pytorch issue 135712).
        kept, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        own = dist.PrefixStore(f"restart-{restarts()}", kept)
        rendezvous = {"store": own, "rank": rank, "world_size": world_size}
    else:
        rendezvous = {}
    if not runtime.on_cpu:
        torch.cuda.set_device(runtime.device)
        if allocator_bytes is not None:
            total_bytes = torch.cuda.get_device_properties(runtime.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, allocator_bytes) / total_bytes))
        rendezvous["device_id"] = runtime.device
    backend = "gloo" if runtime.on_cpu else "nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **rendezvous)


def settle_kernels(*, deterministic: bool) -> None:
    """Choose, before the first of them runs, GPU kernels that give the same bits again, or the fastest.

    Of those that OPT needs only attention's backward pass differs: the fast ones add up dQ in any order.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products
    torch.use_deterministic_algorithms(deterministic)
    # Nothing here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def quiet_third_parties(runtime: Runtime) -> None:
    """Silence import-time chatter, and progress bars where nobody watches them redraw.

    Must run before the first import of colossalai, transformers or datasets.
    """
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (runtime.is_main and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def quiet_colossalai() -> None:
    """Import ColossalAI and silence its own logger, which prints every record twice."""
    import colossal_ext  # noqa: F401  # imports it the lean way, so it goes first

    # isort: split
    from colossalai.logging import get_dist_logger

    get_dist_logger().set_level("ERROR")


def start_logging(runtime: Runtime) -> None:
    """Print log lines of rank 0 to stdout, and only errors with their rank from the others to stderr."""
    handler = logging.StreamHandler(sys.stdout if runtime.is_main else sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if runtime.is_main else f"[rank {runtime.rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if runtime.is_main else logging.ERROR)
    log.propagate = False


def check_versions() -> None:
    """Warn of a package newer than the tested ones.

    Raises:
        ConfigError: a package is missing, older than tested, or another ColossalAI than 0.5.0.
    """
    fix = "run `bash setup.sh`, or `pip install -r requirements.txt && pip install --no-deps -r requirements-colossalai.txt`"
    for package, oldest, newest in TESTED_VERSIONS:
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ConfigError(f"{package} is not installed: {fix}") from None
        if _numbers(found) < _numbers(oldest) or (package == "colossalai" and found != newest):
            raise ConfigError(f"{package} {found} is not supported (tested: {oldest} to {newest}): {fix}")
        if _numbers(found)[:2] > _numbers(newest)[:2]:
            log.warning(f"{package} {found} is newer than the tested {newest}; if something breaks, {fix}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:3] if part.isdecimal())


def settle_hub(timeout_s: float = 5.0) -> bool:
    """Ask the Hugging Face hub for one sign of life, go offline where there is none, and return whether it lives.

    The hub's client retries for 25 s a file; offline it answers at once, from its cache or with an error.
    Must run before the first import of transformers or datasets.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):  # as its client reads it
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True


class StopSignal:
    """Remembers a SIGTERM, SIGINT or SIGUSR1, so that the run can end between two steps; SIGINT twice ends at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.number == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.number = self.number or number

    @property
    def seen(self) -> bool:
        return self.number > 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number; SIGTERM where only another rank was told to stop."""
        return 128 + (self.number or signal.SIGTERM)


def run_to_exit(body: Callable[[Runtime], int]) -> None:
    """Run `body` and end the process with the exit code of the README's table.

    An orderly end, which every rank reaches by itself, leaves through `sys.exit`. A failure of one rank leaves at
    once through `os._exit`: a rank that lingers in clean-up would keep the others in a collective until its timeout.
    """
    # Without fixed segments, freed memory of one size serves another: a cap or a full GPU is used to the end.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    runtime = current_runtime()
    start_logging(runtime)
    if started_again() and runtime.local_rank == 0:
        _forget_exit_code()
    try:
        code = body(runtime)
    except ConfigError as error:
        _tell_refusal(error, runtime)
        code = EXIT_CONFIG
    except KeyboardInterrupt:
        leave_now(128 + signal.SIGINT)
    except RankFailure as failure:
        print(f"error: [rank {runtime.rank}] {failure}", file=sys.stderr, flush=True)
        leave_now(EXIT_ERROR)
    except Exception as error:
        if is_out_of_memory(error):
            leave_now(EXIT_OOM)
        if not _is_explained():
            print(f"[rank {runtime.rank}] {traceback.format_exc()}", file=sys.stderr, flush=True)
        leave_now(EXIT_ERROR, is_explained=False)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(_report_exit_code(code, runtime))


def _tell_refusal(error: ConfigError, runtime: Runtime) -> None:
    """Print what is wrong, once a machine where all of its ranks are refused.

    One that is refused alone says so itself and ends the run: the others would wait for it until their timeout.
    """
    if runtime.local_rank > 0:
        if not _comes_true(_is_explained, ALONE_AFTER_S):
            print(f"[rank {runtime.rank}] {error.lines}", file=sys.stderr, flush=True)
            leave_now(EXIT_CONFIG)
        return
    print(error.lines, file=sys.stderr, flush=True)
    if path := os.environ.get("CLM_EXIT_CODE_FILE"):
        _write_exit_code(path, EXIT_CONFIG)
        # Later all ranks are refused at once, and leave the process group together.
        if not (dist.is_initialized() or _comes_true(lambda: not _fellow_ranks(), ALONE_AFTER_S)):
            leave_now(EXIT_CONFIG)


def _comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met


def _fellow_ranks() -> list[psutil.Process]:
    """Return the other ranks of this machine that are alive: torchrun's other processes with this one's command."""
    own, fellows = psutil.Process(), []
    for process in psutil.Process(os.getppid()).children():
        with suppress(psutil.NoSuchProcess):  # it ends meanwhile
            if process != own and process.status() != psutil.STATUS_ZOMBIE and process.cmdline() == own.cmdline():
                fellows.append(process)
    return fellows


def _report_exit_code(code: int, runtime: Runtime) -> int:
    """Hand `code` to the launcher, where there is one, and return what torchrun shall see.

    torchrun answers any code but 0 with a page of its own traceback and exits with 1, so the launcher gives us a
    file for the true code.
    """
    path = os.environ.get("CLM_EXIT_CODE_FILE")
    if not path or code == EXIT_OK:
        return code
    if runtime.local_rank == 0:  # each machine has a launcher of its own
        _write_exit_code(path, code)
    return EXIT_OK


def restarts() -> int:
    """Return how often torchrun has started the ranks again after a failure on this machine."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def started_again() -> bool:
    """Return whether the launcher's torchrun has started this rank before.

    torch does not count it where only another machine's ranks had failed, so each rank leaves a mark beside the
    launcher's file.
    """
    path = os.environ.get("CLM_EXIT_CODE_FILE")
    if restarts() or not path:
        return restarts() > 0
    mark, pid = Path(f"{path}.{os.environ.get('LOCAL_RANK', 0)}"), str(os.getpid())
    if not mark.exists():
        mark.write_text(pid, encoding="ascii")
    return mark.read_text(encoding="ascii") != pid


def start_of_torchrun() -> float:
    """Return the Unix time at which this process's parent was started."""
    return psutil.Process(os.getppid()).create_time()


def _forget_exit_code() -> None:
    """What ended the ranks before is no longer how the run ends."""
    if path := os.environ.get("CLM_EXIT_CODE_FILE"):
        open(path, "w").close()


def _write_exit_code(path: str, code: int) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(str(code))


def _is_explained() -> bool:
    """Return whether a rank of this machine has said why the run ends: an error that follows is only its echo."""
    path = os.environ.get("CLM_EXIT_CODE_FILE")
    return bool(path and os.path.exists(path) and os.path.getsize(path))


def leave_now(code: int, *, is_explained: bool = True) -> None:
    """End this process, and with it the run.

    Args:
        is_explained: a sentence has said why; what other ranks then meet is only its echo.
    """
    path = os.environ.get("CLM_EXIT_CODE_FILE")
    if path and is_explained:
        _write_exit_code(path, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
