"""`collm push`: a checkpoint folder onto the Hugging Face Hub, with a model card of what was run."""

from __future__ import annotations

from dataclasses import dataclass, field

from collm.hub import push_checkpoint

HELP = "upload a checkpoint to the Hugging Face Hub, with a model card that says what was run"
EXAMPLE = """
hf auth login
collm push my-checkpoint me/my-deferral-checkpoint --private
collm push my-head me/my-head --base-model Qwen/Qwen2.5-Coder-0.5B-Instruct     # a few kilobytes, loaded on its base
collm push my-checkpoint me/my-deferral-checkpoint --results eval/results.json  # with the numbers of `collm eval`
"""


@dataclass
class Arguments:
    """Options of `collm push`. The access token comes from `hf auth login` or HF_TOKEN, never from the command line."""

    folder: str = field(metadata={"positional": True, "help": "checkpoint: full, head-only or LoRA"})
    repository: str = field(metadata={"positional": True, "help": "name on the Hub, me/name; created where missing"})
    head_only: bool = field(
        default=False,
        metadata={"help": "of a full checkpoint, upload the head alone: right where the base was not trained"},
    )
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    base_model: str | None = field(
        default=None, metadata={"help": "the base's name on the Hub, where the checkpoint names a local folder"}
    )
    license: str | None = field(default=None, metadata={"help": "for the card; default: the base's, where it says one"})
    results: list[str] = field(
        default_factory=list, metadata={"help": "results.json of `collm eval`, one or more, for the card"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch; created where missing"})
    message: str | None = field(default=None, metadata={"help": "of the commit"})


def run(arguments: Arguments) -> int:
    """Upload; the last line on standard output is the commit's URL."""
    url = push_checkpoint(
        arguments.folder,
        arguments.repository,
        head_only=arguments.head_only,
        private=arguments.private or None,
        base_model=arguments.base_model,
        license=arguments.license,
        results=arguments.results,
        revision=arguments.revision,
        commit_message=arguments.message,
    )
    print(url)
    return 0
