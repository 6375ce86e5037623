"""In transformers: `from_pretrained` opens a folder that lpsparse has packed, and gives an ordinary model.

To transformers we are a quantizer, whose weights are dequantized as they are loaded, and which is gone after
it. Here is what it is told; how stored bytes become its parameters is in `reading`.
"""

import re
from typing import Any

import transformers
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lpsparse.checkpoint.entry import parse_entry
from lpsparse.errors import UsageError

_METHOD = "lpsparse"
_FLOOR, _CEILING = (5, 21), (6, 0)
_NEEDED = ("update_attn_implementation", "update_weight_conversions", "get_new_dtype", "postprocess_model")
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def register() -> None:
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(_METHOD)(LpsparseConfig)
        register_quantizer(_METHOD)(LpsparseQuantizer)


def check_version() -> None:
    """Raises UsageError: what the reading needs may be missing, or do nothing, in another transformers."""
    version = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])
    if not _FLOOR <= version < _CEILING or any(not hasattr(HfQuantizer, name) for name in _NEEDED):
        what = f"transformers {transformers.__version__} cannot open packed folders; 5.21 and newer 5.x can"
        raise UsageError(260, what, hint="`lpsparse unpack` the folder, or use lpsparse.load")


class LpsparseConfig(QuantizationConfigMixin):
    """The entry in config.json, checked."""

    dequantize = True  # transformers then takes the entry out of the loaded model's config

    def __init__(self, **given: Any) -> None:
        check_version()
        self.entry = parse_entry(given)
        self.quant_method = _METHOD  # pyright: ignore[reportAttributeAccessIssue]  # it says its own enum

    def to_dict(self) -> dict[str, Any]:
        return self.entry.model_dump()


class LpsparseQuantizer(HfQuantizer):
    requires_calibration = True  # it cannot be asked to pack an ordinary model

    def __init__(self, quantization_config: LpsparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.entry = quantization_config.entry

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Named for something else: the one call that gets the config before files are looked for."""
        config.transformers_weights = "lpsparse.safetensors" + (".index.json" if self.entry.sharded else "")
        if getattr(config, "dtype", None) is None and self.entry.dtype:
            config.dtype = _TORCH[self.entry.dtype]  # else it would be that of what is stored densely
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        from lpsparse.integrations.reading import Reading

        self._reading = Reading(self.entry, checkpoint_files or [], model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return self._reading.around(weight_conversions)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        self._reading.cast(converter, dtype)
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self._reading.finish(model)
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        return model
