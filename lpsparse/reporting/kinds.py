"""The layer type of a tensor, by its name: for tables and colours, never for what is cut."""

import re

from lpsparse.pruning.roles import bare, is_head

OTHER = "other"
_TAIL = 200  # letters of a name that are looked at: a hostile one may have millions
_PATTERNS = (  # in this order, the first that is found
    ("bias", r"(^|[._])bias$"),
    ("norm", r"norm|(^|[._])(ln|bn)[._\df]"),
    ("embedding", r"embed|(^|[._])(wte|wpe)[._]"),
    ("attention q, k, v", r"qkv|query_key_value|c_attn|in_proj"),
    ("attention q", r"(^|[._])(q|wq|query)(_proj|_lin)?[._]"),
    ("attention k", r"(^|[._])(k|wk|key)(_proj|_lin)?[._]"),
    ("attention v", r"(^|[._])(v|wv|value)(_proj|_lin)?[._]"),
    ("attention out", r"(^|[._])(o_proj|wo)[._]|att.*[._](dense|proj|out_proj|c_proj|out_lin|to_out)[._]"),
    ("mlp", r"mlp|ffn|feed_forward|expert|intermediate|output\.dense|(gate|up|down)_proj"
            r"|[._](w[123]|fc\d|lin\d|c_fc)[._]"),
    ("convolution", r"conv|downsample"),
    ("pooler", r"pooler"),
)  # fmt: skip
ATTENTION_ROWS = ("attention q", "attention k", "attention v", "attention q, k, v")  # heads are rows
KINDS = (  # in the order of tables and colours
    "bias", "norm", ATTENTION_ROWS[-1], *ATTENTION_ROWS[:-1], "attention out", "mlp", "embedding", "head",
    "convolution", "pooler", OTHER,
)  # fmt: skip


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """One of KINDS. A wrong guess puts a tensor into a wrong line of a table, no more."""
    tail = bare(name[-_TAIL:]).lower()
    found = next((kind for kind, pattern in _PATTERNS if re.search(pattern, tail)), OTHER)
    if found not in ("bias", "norm", "embedding", "pooler") and is_head(tail):
        return "head"
    return "convolution" if found == OTHER and len(shape) == 4 else found
