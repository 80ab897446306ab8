"""What stands beside the weights of a Hugging Face model: its tokenizer, and how it generates."""

from shlex import quote

from ep_plugin.checkpoint.open import is_hf, safetensors
from ep_plugin.checkpoint.target import Target
from ep_plugin.commands.convert.request import Request

_GENERATION = "generation_config.json"
_FILES = f"its tokenizer (tokenizer.json, tokenizer_config.json and the like) and {_GENERATION}"
_FLAGS = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model"


def tokenizer(request: Request, target: Target) -> str | None:
    """Return what became of these files, or what the user has to do; None where there are none."""
    source = target.model.folder
    found = [str(path) for path in safetensors().files_beside(source)] if is_hf(source) else []
    has_one = any(name != _GENERATION for name in found)
    if request.format == "hf":
        said = [f"copied beside the weights: {', '.join(found)}"] if found else []
        if not has_one:
            known = getattr(target.model.args, "tokenizer_model", None)
            whence = f"; the run had --tokenizer-model {known}" if known else ""
            said.append(
                f"{source} has no tokenizer{whence}; copy {_FILES} from the model that it began "
                f"with into {request.target}"
            )
        return "; ".join(said)
    if has_one:
        return f"the tokenizer stays where it is; a run finds it with {_FLAGS} {quote(str(source))}"
    return f"{source} has no tokenizer, and a run needs one" if is_hf(source) else None
