"""Which of the server's environment variables its children inherit: those that their work needs, and no others."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opd_mcp.schemas.redaction import SECRET_NAMES

NAMES = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "LANG", "LANGUAGE", "TERM", "NO_COLOR"),
        *("TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "CONDA_PREFIX", "CC", "CXX", "CPATH", "LIBRARY_PATH"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    }
)
PREFIXES = (
    *("LC_", "PYTHON", "XDG_", "OTEL_", "COVERAGE_", "RUST_", "MALLOC_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "TOKENIZERS_"),
    *("TORCH", "PYTORCH_", "TRITON_", "CUDA_", "CUBLAS_", "NVIDIA_", "NCCL_"),
    *("OMP_", "MKL_", "KMP_", "OPENBLAS_", "VECLIB_", "NUMEXPR_"),
    *("VLLM_", "SGLANG_"),
)
BOUNDED_NAMES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")
# What is called a secret is passed on by its full name only.
TEACHER_KEY = "OPD_TEACHER_KEY"
HUB_TOKENS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
TRACKER_PREFIXES = {"trackio": ("TRACKIO_",), "wandb": ("WANDB_",), "mlflow": ("MLFLOW_",)}
TRACKER_SECRETS = {
    "trackio": HUB_TOKENS,
    "wandb": {"WANDB_API_KEY"},
    "mlflow": {"MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a worker; the Hub's token is among them unless fetching is switched off (HF_HUB_OFFLINE=1)."""
    secrets = {TEACHER_KEY} if _is_offline(environment) else {TEACHER_KEY, *HUB_TOKENS}
    inherited = {name: value for name, value in environment.items() if name in secrets or _is_needed(name)}
    # Python's own way of finding this package must survive the change of folder.
    return {**inherited, "PYTHONPATH": absolute_import_path(environment), "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class HubAccess:
    """Where the Hub is asked, and with which token."""

    endpoint: str = "https://huggingface.co"
    token: str | None = field(default=None, repr=False)


def hub_access(environment: Mapping[str, str]) -> HubAccess | None:
    """How the Hub is asked what a model's sizes are; None where fetching is switched off (HF_HUB_OFFLINE=1)."""
    if _is_offline(environment):
        return None
    endpoint = environment.get("HF_ENDPOINT") or HubAccess.endpoint
    return HubAccess(endpoint.rstrip("/"), hub_token(environment))


def hub_token(environment: Mapping[str, str]) -> str | None:
    """The Hub's token."""
    return next((environment[name] for name in sorted(HUB_TOKENS) if environment.get(name)), None)


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an engine that a worker starts, which has an environment of its own: no secret, no Python's."""
    own = ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_PRELOAD", "COVERAGE_", "OTEL_")
    return {name: value for name, value in environment.items() if _is_needed(name) and not name.startswith(own)}


def tracker_environment(environment: Mapping[str, str], tracker: str) -> dict[str, str]:
    """The variables of the process that mirrors a run to a tracker: with this tracker's own ones and its secrets."""
    prefixes, secrets = TRACKER_PREFIXES.get(tracker, ()), TRACKER_SECRETS.get(tracker, frozenset[str]())
    inherited = {
        name: value
        for name, value in environment.items()
        if name in secrets or _is_needed(name) or (name.startswith(prefixes) and not SECRET_NAMES.search(name))
    }
    return {**inherited, "PYTHONPATH": absolute_import_path(environment), "PYTHONUNBUFFERED": "1"}


def bounded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a short child under limits: no secret, no network's settings, one thread."""
    inherited = {name: environment[name] for name in BOUNDED_NAMES if name in environment}
    return {
        **inherited,
        "PYTHONPATH": absolute_import_path(environment),
        "PYTHONUTF8": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
    }


def absolute_import_path(environment: Mapping[str, str]) -> str:
    """The PYTHONPATH with every entry absolute."""
    given = environment.get("PYTHONPATH", "")
    return os.pathsep.join(str(Path(entry).absolute()) for entry in given.split(os.pathsep) if entry)


def _is_offline(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name, "").lower() in ("1", "on", "yes", "true") for name in OFFLINE)


def _is_needed(name: str) -> bool:
    return (name in NAMES or name.startswith(PREFIXES)) and SECRET_NAMES.search(name) is None
