"""Which prompts are asked for? Those on the command line, or of a file: lines of text or JSON, or a folder of texts."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from deco_jax import storage
from deco_jax.data.tokens import check_prompt
from deco_jax.encoders.text import TextEncoder, load_run_encoder
from deco_jax.errors import UsageError
from deco_jax.pretrained.load import Pretrained
from deco_jax.storage import AnyPath

FIELD = "prompt"  # of a JSON line
KINDS = 'a .txt with one prompt in each line, a .jsonl with {"prompt": …} in each, or a folder of .txt with one in each'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an image is to show, and what its file says beside it."""

    text: str
    name: str = ""  # of its file, in a folder of them, without the ending
    line: str = ""  # of JSON that it stands in, as it is
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # that the line says


def choose_prompts(prompt: Sequence[str], prompts: str | None) -> list[Prompt]:
    """Those of `--prompt`, which may be repeated, or of the file or folder that `--prompts` names.

    Raises:
      UsageError: none or both are given, there is no such file, or a prompt is empty, too long, or has control
        characters.
    """
    if bool(prompt) == (prompts is not None):
        raise UsageError("a network of text needs --prompt=TEXT, or --prompts=FILE; one of them.")
    if prompts is None:
        return [Prompt(_checked(text, "--prompt")) for text in prompt]
    if not prompts:
        raise UsageError(f"--prompts is empty; expected is {KINDS}.")
    return read_prompts(storage.to_path(prompts), f"--prompts={prompts}")


def read_prompts(path: AnyPath, option: str) -> list[Prompt]:
    """All prompts of a file or folder, in order; `option` says where its name comes from.

    Raises:
      UsageError: see `choose_prompts`; the place of a bad prompt is named.
    """
    with storage.reading(path):
        if storage.retried(f"looking at {path}", path.is_dir):
            found = _folder(path, option)
        elif path.suffix.lower() in _OF_ENDING:
            found = _OF_ENDING[path.suffix.lower()](_text(path, option), option)
        else:
            raise UsageError(f"{option} is none of the files that are read: {KINDS}.")
    if not found:
        raise UsageError(f"{option} holds no prompt; expected is {KINDS}.")
    return found


def _folder(path: AnyPath, option: str) -> list[Prompt]:
    names = storage.retried(f"reading {path}", lambda: [file.name for file in path.iterdir()])
    texts = sorted(name for name in names if name.endswith(".txt") and not name.startswith("."))
    return [Prompt(_checked(_text(path / name, option), f"{option}/{name}"), name[:-4]) for name in texts]


def _lines(text: str, option: str) -> list[Prompt]:
    lines = [(k, line) for k, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [Prompt(_checked(line, f"{option}, line {k}")) for k, line in lines]


def _json_lines(text: str, option: str) -> list[Prompt]:
    found = []
    for k, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            prompt = values[FIELD]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            expected = f'expected is JSON, {{"{FIELD}": TEXT, …}}'
            raise UsageError(f"{option}, line {k}: {expected}; {line[:60]!r} is not.") from error
        found.append(Prompt(_checked(prompt, f"{option}, line {k}"), line=line.strip(), values=values))
    return found


_OF_ENDING: dict[str, Callable[[str, str], list[Prompt]]] = {".txt": _lines, ".jsonl": _json_lines}


def _text(path: AnyPath, option: str) -> str:
    try:
        return storage.retried(f"reading {path}", path.read_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}: {path.name} is no text in UTF-8 ({error.reason}).") from error


def _checked(text: Any, where: str) -> str:
    """The prompt without space around it; UsageError says where it stands."""
    try:
        check_prompt(text)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    if not text.strip():
        raise UsageError(f"{where}: the prompt is empty; write what the images shall show.")
    return text.strip()


def checked_negative(text: str | None) -> str | None:
    """What guidance leads away from; "" and None are the empty prompt. Raises UsageError as `choose_prompts`."""
    return _checked(text, "--negative") if text and text.strip() else None


def open_encoder(found: Pretrained, name: str | None) -> TextEncoder:
    """The text encoder of a network: `name`, or the one that its run's configuration names.

    Raises:
      UsageError: it is not to be had, or has states of another width than the network takes.
    """
    config = found.config.copy_and_resolve_references()
    config.text.encoder = name or config.text.encoder
    if not config.text.encoder:
        raise UsageError(
            f"{found} does not say which text encoder its network listens to, one with states of "
            f"{config.model.text_features} channels; name it: --text-encoder NAME."
        )
    return load_run_encoder(config)


def warnings_of(found: Pretrained, encoder: TextEncoder, texts: Sequence[str]) -> list[str]:
    """What a user should know before images are drawn from these prompts."""
    told = []
    if found.text_digest not in (None, encoder.weights.digest):
        told.append(
            f"Attention: this network learned from another text encoder or dtype ({found.text_digest}) than "
            f"{encoder.weights.network.purpose} ({encoder.weights.digest})."
        )
    if cut := encoder.tokenizer.too_long(texts):
        most = encoder.tokenizer.length
        told.append(
            f"Attention: {len(cut):,} prompt(s) have more than {most} tokens, of which the rest is not seen; the first "
            f"is {cut[0][:60]!r}…"
        )
    return told
