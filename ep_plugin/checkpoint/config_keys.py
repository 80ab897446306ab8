"""Reading config.json: every key is read, is known to be without effect, or is refused."""

from collections.abc import Iterator
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, shown

Config = dict[str, Any]  # what config.json holds
# Keys that change neither what the model computes nor its training: labels of tasks, what a call
# returns, options of generation, where a file comes from, which implementation runs.
_WORDS = """
    architectures auto_map model_type transformers_version _name_or_path name_or_path _commit_hash
    custom_pipelines task_specific_params finetuning_task problem_type id2label label2id
    num_labels classifier_dropout summary_type tokenizer_class prefix output_attentions
    output_hidden_states output_router_logits output_scores return_dict return_dict_in_generate
    use_cache cache_implementation is_decoder torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward tie_last_hidden_states pretraining_tp ep_size _attn_implementation
    attn_implementation _attn_implementation_autoset _experts_implementation
    experts_implementation unsloth_version unsloth_fixed bos_token_id eos_token_id pad_token_id
    sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id assistant_confidence_threshold assistant_lookbehind
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
"""
WITHOUT_EFFECT = frozenset(_WORDS.split())
_MOST = 20  # keys in a message
# Read where the weights are opened, not by a model family: dtype, and MTP layers after the last.
READ_WITH_WEIGHTS = frozenset(
    ("dtype", "torch_dtype", "quantization_config", "num_nextn_predict_layers", "num_mtp_layers")
)


class Keys(dict[str, Any]):
    """A JSON object that remembers which of its keys were read, and its own name for messages.

    A copy, such as `dict(keys)`, does not: a key that is read only from a copy counts as not read,
    and is refused.
    """

    def __init__(self, values: dict[str, Any], name: str = "") -> None:
        super().__init__(values)
        self._name = name
        self.passed: set[str] = set()
        self._read: set[str] = set()
        self._inner: list[Keys] = []

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`; `default` if it is missing or null."""
        self._read.add(key)
        value = super().get(key)
        return default if value is None else value

    def within(self, key: str) -> "Keys":
        """Return the object that is the value of `key`; an empty one if it is missing.

        Its keys must be read as well. Raises ConfigError for a value that is not an object.
        """
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise refusal(self, key, "an object such as {'rope_type': 'default'}")
        inner = Keys(value, self.path(key))
        self._inner.append(inner)
        return inner

    def path(self, key: str) -> str:
        """Return the name of `key` for messages: `rope_scaling.factor` in an inner object."""
        return f"{self._name}.{key}" if self._name else key

    def number(self, key: str, whole: bool = False) -> Any:
        """Return a number, an integer if `whole`. Raises ConfigError for anything else."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise refusal(self, key, "a whole number" if whole else "a number")
        return value

    def listing(self, key: str) -> list[Any]:
        """Return a list, empty if `key` is missing. Raises ConfigError for anything else."""
        value = self.get(key, [])
        if not isinstance(value, list):
            raise refusal(self, key, "a list")
        return value

    def passed_over(self, *keys: str) -> None:
        """Mark `keys` as without effect, given the values of other keys."""
        self.passed |= {*keys}

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and value of every key that was not read and is not null."""
        for key, value in self.items():
            if key not in self._read | self.passed and value is not None:
                yield self.path(key), value
        for inner in self._inner:
            yield from inner.unread()


def refusal(keys: dict[str, Any], key: str, legal: str) -> ConfigError:
    """Return the error for a value that is not what `legal`, a text, describes."""
    name = keys.path(key) if isinstance(keys, Keys) else key
    return ConfigError(
        f"config.json has {name} = {shown(dict.get(keys, key))}, which has no counterpart here; "
        f"give a model with {legal}"
    )


def refuse_unread(keys: Keys, model_type: str) -> None:
    """Raise ConfigError if any key is neither read nor known to be without effect."""
    known = WITHOUT_EFFECT | READ_WITH_WEIGHTS
    unknown = [(name, value) for name, value in keys.unread() if name not in known]
    if unknown:
        named = ", ".join(f"{cut(name)} = {shown(value)}" for name, value in unknown[:_MOST])
        named += f" and {len(unknown) - _MOST} more" if len(unknown) > _MOST else ""
        raise ConfigError(
            f"config.json has {named}, of which nothing is known for a {model_type!r}; take it out "
            "of config.json if the model computes the same without it, else give another model"
        )
