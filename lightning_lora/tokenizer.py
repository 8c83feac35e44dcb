"""The tokenizer of a base model, and the padding token that tokenizer and model share.

Data pads by the tokenizer, decoders of transformers look for the last token by ``config.pad_token_id``, and whoever
loads an exported folder does both: the token is chosen here and nowhere else.
"""

import math
from inspect import signature
from typing import Any

from lightning_lora.errors import UserError, first_line


def load_tokenizer(target: str, key: str) -> Any:
    """Load the fast tokenizer of a base model: with a padding token, padding on the right, no truncation of its own.

    A tokenizer without a padding token that the model has an embedding for pads with that of the model's config where
    it is special, else with its end-of-text token, else with its unknown token; last of all with one that it puts into
    every text. Language models read the last token that is another. Positions are counted from the left, so padding
    there would move the text.

    Args:
        target: What ``from_pretrained`` takes.
        key: The config key that holds the name, for messages.

    Raises:
        UserError: There is no tokenizer, it is not a fast one, or nothing in it can be used for padding.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    except Exception as error:  # a damaged file raises kinds of several libraries
        raise UserError(
            f"{key}: cannot load a tokenizer from '{target}' ({first_line(error)}); check the name and the network, "
            "or give a local folder"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{key}: '{target}' has a tokenizer in Python only ({type(tokenizer).__name__}); a fast one "
            "(tokenizer.json) is needed"
        )
    rows, configured = _embedding_rows(target)
    special, framed = tokenizer.added_tokens_decoder, tokenizer("a")["input_ids"]
    spare = [configured if configured in special and special[configured].special else None]
    spare = sorted([*spare, tokenizer.eos_token_id, tokenizer.unk_token_id], key=framed.__contains__)
    wanted = [tokenizer.pad_token_id, *spare]
    usable = [tokenizer.convert_ids_to_tokens(number) for number in wanted if number is not None and number < rows]
    if not usable:
        raise UserError(
            f"{key}: the tokenizer of '{target}' has no padding, end-of-text or unknown token with an embedding to pad "
            "with; set pad_token in its tokenizer_config.json to one of the model's tokens"
        )
    if tokenizer.pad_token != usable[0]:
        tokenizer.pad_token = usable[0]
    tokenizer.padding_side = "right"
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _embedding_rows(target: str) -> tuple[float, int | None]:
    """How many tokens the base model has an embedding for, and which pads, as its config says.

    What cannot be read is no limit.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
        return getattr(config, "vocab_size", None) or math.inf, config.pad_token_id
    except Exception:  # a folder without a model, of which others say so
        return math.inf, None


def longest_input(tokenizer: Any) -> float:
    """Tokens that the tokenizer, and the config of its base model beside it, say that the model takes at most.

    A model without a limit, or whose limit neither says, gives a very large number or infinity.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(tokenizer.name_or_path).get_text_config()
    except Exception:  # a folder without a model, of which others say so
        return tokenizer.model_max_length
    positions = getattr(config, "max_position_embeddings", None) or -1  # XLNet's, which has no limit, is -1
    return min(tokenizer.model_max_length, positions if positions > 0 else math.inf)


def has_token_types(tokenizer: Any) -> bool:
    """Say whether the tokenizer gives token types and its base model has an embedding for more than one."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    if "token_type_ids" not in tokenizer.model_input_names:
        return False
    try:
        config = AutoConfig.from_pretrained(tokenizer.name_or_path)
        model: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    except Exception:  # a folder without a model, of which others say so
        return False
    return "token_type_ids" in signature(model.forward).parameters and getattr(config, "type_vocab_size", 2) > 1


def tokens_beyond(tokenizer: Any, rows: int) -> list[str]:
    """Give the tokens that an embedding of so many rows has none for, in the order of their numbers.

    Special tokens that have a name and are put into no text are none of them: classes of tokenizers add some.
    """
    named = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    used = {tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer("a")["input_ids"]}
    found = [(number, token) for token, number in tokenizer.get_vocab().items() if number >= rows]
    return [token for number, token in sorted(found) if token not in named or number in used]


def ordinary_ids(tokenizer: Any, most: int = 97) -> list[int]:
    """Give the first tokens that are not special, to make up a text of."""
    special = set(tokenizer.all_special_ids)
    numbers = sorted(tokenizer.get_vocab().values())
    return [number for number in numbers if number not in special][:most] or numbers[:most]
