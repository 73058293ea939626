"""What a run is asked to do: checked before any model is loaded, and kept in `run.json`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from sd_guard.screening.jobs import DUPLICATES_FILE, JOBS_FILE
from sd_guard.screening.prompts import MAX_SEED, STANDARD_INPUT, Format, find_files, list_digest
from sd_guard.screening.storage import Store

RUN_FILE: Final = "run.json"
SKIPPED_FILE: Final = "skipped.txt"  # with --skip-bad: a line a row that was left out
OnFailure: TypeAlias = Literal["blank", "keep"]
Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
Engine: TypeAlias = Literal["local", "ray"]
Depth: TypeAlias = Literal["quick", "full", "auto"]
BATCH_SIZES: Final[dict[Depth, int]] = {"quick": 256, "full": 16, "auto": 64}  # unless another is asked for
_FIELDS: Final = {  # of `run.json`, that a report reads
    "configuration": dict,
    "prompts": str,
    "versions": dict,
    "threshold": int | float | None,
}
_PACKAGES: Final = ("sd-guard", "torch", "diffusers", "transformers", "pyarrow")
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WEIGHTS: Final = frozenset({".safetensors", ".bin", ".ckpt", ".pt"})
_END: Final = 1 << 20  # bytes at either end of a weight file that the fingerprint reads


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The model, and how images are sampled from it.

    Attributes:
        model: A local checkpoint folder, or a hub name ("owner/name").
        calibration: A calibration file, or None for the calibration-free default.
        steps: Sampling steps, >= 1.
        guidance_scale: Of classifier-free guidance, >= 0; at most 1 means none.
        budget: Extra lane evaluations an image, >= 0, or None for the guard's default.
        on_failure: What becomes of an image that no mitigation rescued.
        device: A torch device, or None for CUDA if there is one.
        dtype: Of the weights.
        height: Pixels, a multiple of 8, or None for the model's own.
        width: As `height`.

    Raises:
        ValueError: If a value is out of its range, or a file is not there.
    """

    model: str
    calibration: Path | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    budget: int | None = None
    on_failure: OnFailure = "blank"
    device: str | None = None
    dtype: Dtype = "float32"
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Checks every value that can be checked without torch."""
        _at_least("--steps", self.steps, 1)
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"--guidance-scale is {self.guidance_scale}; use a number >= 0")
        if self.budget is not None:
            _at_least("--budget", self.budget, 0)
        _one_of("--on-failure", self.on_failure, get_args(OnFailure))
        _one_of("--dtype", self.dtype, get_args(Dtype))
        for name, pixels in (("--height", self.height), ("--width", self.width)):
            if pixels is not None and (pixels < 8 or pixels % 8):
                raise ValueError(f"{name} is {pixels}; use a positive multiple of 8")
        if self.device is not None and not re.fullmatch(r"cpu|(cuda|xpu|mps)(:\d+)?", self.device):
            raise ValueError(f"--device is {self.device!r}; use cpu, cuda, cuda:N, xpu or mps")
        if self.calibration is not None:
            _check_calibration(self.calibration)
        folder = Path(self.model)
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise ValueError(f"{folder}: has no model_index.json; name the folder of a diffusers checkpoint")
        elif folder.exists() or not _HUB_NAME.fullmatch(self.model):
            raise ValueError(f"{self.model}: is neither a checkpoint folder nor a hub name; check --model")

    @property
    def is_local(self) -> bool:
        """True for a folder: then the network is not touched."""
        return Path(self.model).is_dir()


def _check_calibration(path: Path) -> None:
    """Whether it fits the model is seen when that is there; that it is one is seen before."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a calibration, or leave --calibration out")
    from sd_guard.calibration import Calibration

    Calibration.load(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """One run: prompts x seeds, screened with one model.

    Attributes:
        prompts: The prompt list: a file, a glob, or `-` for standard input.
        out: The run folder, a path or an address of fsspec.
        model: The model and its sampling.
        format: Of the prompt list; None for what the extension says.
        depth: `quick` looks at the first steps and makes no image, `full` makes guarded images, `auto` is quick for all
            and full for those in doubt or flagged.
        seeds: Images a prompt, >= 1.
        seed: Base seed of prompts without their own, in [0, 2**63).
        batch_size: Images a batch, >= 1; a resumed run may change it.
        keep_before: Also keep the unguarded image of every flagged one.
        explain: Also say of every flagged image which words and places it rests on.
        compile: Compile the UNet, at depth `quick`, where all its calls have one shape; a resumed run may change it.
        fold_duplicates: Screen prompts once that are equal after Unicode normalisation and case folding.
        skip_bad: Leave rows out that cannot be used, instead of refusing the list.
        max_unscored: Share of images, in [0, 1], beyond which a run whose images cannot be scored is stopped.

    Raises:
        ValueError: If a value is out of its range.
    """

    prompts: Path | str
    out: Path | str
    model: ModelSettings
    format: Format | None = None
    depth: Depth = "full"
    seeds: int = 1
    seed: int = 0
    batch_size: int = 16
    keep_before: bool = False
    explain: bool = False
    compile: bool = False
    fold_duplicates: bool = False
    skip_bad: bool = False
    max_unscored: float = 0.5

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not str(self.out).strip():
            raise ValueError("--out is empty; name a folder")
        _one_of("--depth", self.depth, get_args(Depth))
        _at_least("--seeds", self.seeds, 1)
        _at_least("--batch-size", self.batch_size, 1)
        check_seed(self.seed)
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"--max-unscored is {self.max_unscored}; use a share from 0 to 1")
        if self.keep_before and self.depth == "quick":
            raise ValueError("--keep-before: --depth quick makes no images; use --depth full or auto")
        if self.compile and self.depth != "quick":
            raise ValueError(f"--compile: at --depth {self.depth} calls have many shapes; use --depth quick")
        if self.explain:
            self._check_explain()

    def _check_explain(self) -> None:
        model = self.model
        if self.depth == "quick":
            raise ValueError("--explain: --depth quick samples nothing to explain; use --depth full or auto")
        if model.height is not None or model.width is not None:
            raise ValueError("--explain: works at the model's own size; leave --height and --width out")
        if find_spec("captum") is None:
            raise ValueError("--explain: captum is not installed; pip install 'sd-guard[explain]'")

    def configuration(self) -> dict[str, Any]:
        """What decides the images and the records: a resumed run must have the same."""
        model = {key: value for key, value in asdict(self.model).items() if key != "calibration"}
        calibration = self.model.calibration
        return {
            "version": package_version("sd-guard"),
            "prompts": list_digest(find_files(self.prompts, self.format)),
            **model,
            "model_fingerprint": _folder_fingerprint(Path(self.model.model)) if self.model.is_local else None,
            "calibration": None if calibration is None else _sha256(calibration),
            "depth": self.depth,
            "seeds": self.seeds,
            "seed": self.seed,
            "keep_before": self.keep_before,
            "explain": self.explain,
            "fold_duplicates": self.fold_duplicates,
            "skip_bad": self.skip_bad,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """A Ray cluster, and how many workers are to be started in it.

    Attributes:
        address: Of a cluster that runs; None starts one on this machine.
        workers: Each with a model of its own; None for one a GPU of the cluster, or 2 where it has none.
    """

    address: str | None = None
    workers: int | None = None


def check_engine(
    engine: Engine, *, workers: int | None, address: str | None, processes: int = 1
) -> ClusterSettings | None:
    """Checks what is asked of the engine; None for the local one.

    Raises:
        ValueError: In one line, if options do not go together, or Ray is not installed.
    """
    if engine == "local":
        for name, value in (("--workers", workers), ("--ray-address", address)):
            if value is not None:
                raise ValueError(f"{name} {value}: is for --engine ray; add that, or leave it out")
        return None
    if processes > 1:
        raise ValueError("--engine ray: starts its own workers; call it without accelerate launch")
    if workers is not None:
        _at_least("--workers", workers, 1)
    if find_spec("ray") is None:
        raise ValueError("--engine ray: ray is not installed; pip install 'sd-guard[ray]'")
    return ClusterSettings(address=address, workers=workers)


def check_metrics_file(path: Path | None) -> None:
    """Raises ValueError unless there is no metrics file to write, or it can be written."""
    if path is None:
        return
    if find_spec("prometheus_client") is None:
        raise ValueError("--metrics-file: prometheus_client is not installed; pip install 'sd-guard[metrics]'")
    if not path.parent.is_dir():
        raise ValueError(f"--metrics-file {path}: there is no folder {path.parent}; make it first")


def check_seed(seed: int) -> None:
    """Raises ValueError unless the seed is in [0, 2**63)."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed is {seed}; use a number from 0 to {MAX_SEED}")


def open_run(settings: RunSettings, configuration: dict[str, Any], *, resume: bool) -> None:
    """Makes the run folder, or checks that it may be gone on with, as `check_run`."""
    store = Store.at(settings.out)
    check_run(store, configuration, resume=resume)
    if store.local is not None:
        store.local.mkdir(parents=True, exist_ok=True)


def check_run(store: Store, configuration: dict[str, Any], *, resume: bool) -> None:
    """Checks that a run may be started in this folder, or gone on with.

    A folder that holds no more than a list of jobs is free: its run ended before it began.

    Raises:
        ValueError: If the folder is in use, is no run's, or was started with another configuration.
    """
    if store.local is not None and store.local.exists() and not store.local.is_dir():
        raise ValueError(f"{store.address}: is a file; name a folder with --out")
    if set(store.names()) <= {JOBS_FILE, DUPLICATES_FILE, SKIPPED_FILE}:
        return
    if not resume:
        raise ValueError(
            f"{store.address}: is not empty; add --resume to go on with that run, or name another folder with --out"
        )
    started = read_manifest(store)["configuration"]
    keys = [key for key in {**started, **configuration} if started.get(key) != configuration.get(key)]
    if keys:
        changes = ", ".join(f"{key} was {started.get(key)!r}, now {configuration.get(key)!r}" for key in keys)
        raise ValueError(
            f"{store.address}: was started otherwise ({changes}); resume it unchanged, or name another folder"
        )


def write_manifest(
    settings: RunSettings, configuration: dict[str, Any], *, images: int, threshold: float | None
) -> None:
    """Writes `run.json` at the start of a run; a resumed run keeps the first one.

    Args:
        settings: Of the run.
        configuration: Of `RunSettings.configuration`.
        images: That the run will have when finished.
        threshold: Scores above it are flagged; None if the detector has no such line.
    """
    store = Store.at(settings.out)
    if store.exists(RUN_FILE):
        if read_manifest(store)["configuration"] != configuration:  # at an address that knows no locks
            raise ValueError(f"{store.address}: another run is at work there; name another folder with --out")
        return
    standard_input = str(settings.prompts) == STANDARD_INPUT
    manifest = {
        "prompts": "standard input" if standard_input else Path(settings.prompts).name,
        "images": images,
        "batch_size": settings.batch_size,
        "threshold": threshold,
        "configuration": configuration,
        "versions": {name: package_version(name) for name in _PACKAGES},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": None,
    }
    store.write(RUN_FILE, _json(manifest))


def finish_manifest(run: Path | Store, *, fingerprint: str | None = None) -> None:
    """Notes in `run.json` when the run was finished, once, and the fingerprint of its records."""
    store, manifest = Store.at(run), read_manifest(run)
    if manifest["finished"] is None:
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        store.write(RUN_FILE, _json({**manifest, "fingerprint": fingerprint, "finished": finished}))


def read_manifest(run: Path | str | Store) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        ValueError: If it is missing or damaged.
    """
    store = Store.at(run)
    path = f"{store.address}/{RUN_FILE}"
    try:
        manifest: object = json.loads(store.read(RUN_FILE))
    except FileNotFoundError:
        raise ValueError(
            f"{store.address}: has no {RUN_FILE}, so it is no run of `sd-guard screen`; name another folder"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read ({reason})") from None
    fields = cast("dict[str, Any]", manifest) if isinstance(manifest, dict) else {}
    if "finished" not in fields or not all(isinstance(fields.get(name), kind) for name, kind in _FIELDS.items()):
        raise ValueError(f"{path}: is not the {RUN_FILE} of a run; name another folder")
    return fields


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None; imports nothing of it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _folder_fingerprint(folder: Path) -> str:
    """Names, sizes and contents of a checkpoint's files; of weights, the first and the last MiB."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if path.suffix not in _WEIGHTS or size <= 2 * _END:
                digest.update(file.read())
            else:
                digest.update(file.read(_END))
                file.seek(-_END, 2)
                digest.update(file.read())
    return digest.hexdigest()


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; use a whole number >= {least}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(allowed)}")
