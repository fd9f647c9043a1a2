"""Models as they are found: a folder, the hub, the toy; its config, its tokenizer, its fingerprint."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from twdpo.chat import Chat, set_chat_template, today
from twdpo.dist import Process
from twdpo.files import hash_file, hash_json
from twdpo.flags import InputError
from twdpo.tokens import Example

TOY_MODEL = Path(__file__).parent.parent / "toy" / "model"  # made by twdpo.toy.train


@dataclass(frozen=True)
class Model:
    """A model's folder, opened once and handed on.

    name: what finds it again: a folder as it was given, `toy`, or a hub id with its revision. config: not to be changed
    (what builds a model from it takes a copy).
    """

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: object
    process: Process
    templated: bool = False  # whether the data's texts hold the template's marks already
    apart: bool = False  # whether answers are tokenised apart from their prompts
    date: str = ""  # of its chat template; empty: today's

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and every weight file; they are read when it is first asked for. All ranks."""
        return self.process.on_main(lambda: fingerprint_model(self.folder))

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer as what makes tokens of conversations takes it."""
        fixed = {"date": self.date} if self.date else {}
        return Chat(self.tokenizer, self.templated, end_ids(self.folder), self.apart, **fixed)

    @property
    def printed_date(self) -> str:
        """The date that its chat template prints; "" of one that prints none."""
        return self.chat.date if self.chat.prints_date else ""


def open_model(name: str, process: Process, chat_template: str = "", flag: str = "--model", needs_template: bool = True,
               templated: bool = False, apart: bool = False, date: str = "") -> Model:
    """Find a model, load its config and tokenizer; its weights are not read. Raises InputError. All ranks.

    name: as `locate_model` takes it. flag: what names it, for messages. templated, apart, date: as of Chat.
    """
    folder = process.on_main(lambda: locate_model(name, flag))
    tokenizer = load_tokenizer(folder, chat_template, needs_template)
    return Model(resolved_name(name, folder), folder, load_model_config(folder), tokenizer, process, templated,
                 apart, process.broadcast(date or today()))


def describe_date(model: Model) -> str:
    return f"the chat template prints a date: that of this run is {model.printed_date} (--date)"


def locate_model(name: str, flag: str) -> Path:
    """A model as a local folder: as it is, fetched from the hub (`id` or `id@revision`), or `toy`. Raises InputError.

    flag: what names it, for messages.
    """
    if name == "toy":
        return TOY_MODEL
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        repository, _, revision = name.partition("@")
        try:
            folder = Path(snapshot_download(
                repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"],
                ignore_patterns=["original/*"]))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise InputError(f"{flag} is {name!r}: no such folder here, and the hub does not give it "
                             f"({error})") from error
    if (folder / "adapter_config.json").is_file():
        raise InputError(describe_adapter(name, flag, folder / "adapter_config.json"))
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag} {name}: no config.json in {folder}")
    try:
        checkpoint_files(folder)
    except ValueError as error:
        raise InputError(f"{flag} {name}: {error}") from error
    return folder


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint, as transformers picks them; others in the folder are not read. Raises
    ValueError where they are not there."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"no model.safetensors and no {index.name} in {folder}; convert the checkpoint (no "
                         ".safetensors file of another name is read, and pickled weights never)")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} names no file by tensor ({type(error).__name__}: {error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}: it may name .safetensors files beside it alone")
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there")
    return [folder / name for name in names]


def describe_adapter(name: str, flag: str, path: Path) -> str:
    """What to do with a model that is an adapter by its adapter_config.json."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    except (OSError, ValueError):
        base = None
    if not base:
        return (f"{flag} {name} is a PEFT adapter, and {path} does not name its base model: merge it into that first "
                "(peft's merge_and_unload), and save the model with its tokenizer")
    return (f"{flag} {name} is a PEFT adapter of {base}: merge it into its base model first (peft's merge_and_unload), "
            f"or train from {flag} {base}")


def resolved_name(name: str, folder: Path) -> str:
    """A hub id with the revision that was fetched (its folder's name in the hub's cache); other names as they are."""
    if Path(name).is_dir() or folder.parent.name != "snapshots":
        return name
    return f"{name.partition('@')[0]}@{folder.name}"


def load_tokenizer(directory: Path, chat_template: str, needs_template: bool = True):
    """The model's fast tokenizer with a chat template. Raises InputError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - its files may say anything
        raise InputError(f"the tokenizer in {directory} can't be loaded: {describe_failure(error)}") from error
    if needs_template:
        set_chat_template(tokenizer, chat_template)
    return tokenizer


def load_model_config(directory: Path):
    """The model's config. Raises InputError."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - config.json may say anything
        raise InputError(f"the config in {directory} can't be loaded: {describe_failure(error)}") from error


def describe_failure(error: Exception) -> str:
    """Why transformers does not load something, without advice that does not hold here."""
    if "trust_remote_code" in str(error):
        return ("it needs code that its folder brings (auto_map), which is never run here; use a model that "
                "transformers has the code of")
    return f"{error}" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def end_ids(folder: Path) -> frozenset[int]:
    """Ids that end generation by the model's generation config. Raises InputError for one that can't be read."""
    path = folder / "generation_config.json"
    try:
        ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} can't be read as a JSON object ({error})") from error
    return frozenset(id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int))


def fingerprint_model(directory: Path) -> str:
    """sha256 over config.json and every weight file, by content."""
    paths = [directory / "config.json", *checkpoint_files(directory)]
    return hash_json([[path.name, hash_file(path)] for path in paths])


def fingerprint_tokenizer(tokenizer) -> str:
    """sha256 over vocabulary, merges, special tokens and chat template."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(json.dumps([tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]).encode())
    return digest.hexdigest()


def context_length(model_config) -> int:
    """Positions the model was made for, in tokens; a large number when its config names none."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def is_rotary(model_config) -> bool:
    """Whether positions past the context are at least defined (rotary) rather than an index out of a table."""
    text_config = model_config.get_text_config()
    return any(getattr(text_config, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta"))


def check_length(name: str, length: int, model_config) -> str:
    """A warning for a longest input past a rotary model's context, "" when it fits; InputError for other models."""
    context = context_length(model_config)
    if length <= context:
        return ""
    if not is_rotary(model_config):
        raise InputError(f"{name} reaches {length} tokens, the model has {context} positions: lower it")
    return f"warning: {name} reaches {length} tokens, the model was made for {context}"


def check_vocabulary(examples: list[Example], model: Model) -> None:
    """Raise InputError when the tokenizer makes ids that the model has no embedding for."""
    largest = max(int(ids.max()) for example in examples
                  for ids in (example.prompt_ids, example.chosen.ids, example.rejected.ids) if len(ids))
    vocabulary = model.config.get_text_config().vocab_size
    if largest >= vocabulary:
        raise InputError(f"{model.folder}: its tokenizer gives id {largest}, its model has {vocabulary} embeddings; "
                         "they don't belong together")
