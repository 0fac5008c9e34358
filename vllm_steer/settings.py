"""The settings of an engine: the single schema of ``steer_config`` and ``--additional-config``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_steer import __version__, spans
from vllm_steer.errors import SettingsError
from vllm_steer.messages import near
from vllm_steer.schema.steering import Steering

CONFIG_KEY = "vllm_steer"

_HOW_COUNTED = " (|alpha - 1| for scale; that and relative ones times the layer's mean residual norm, if it is given)"
_MOST_SHOWN = 80  # characters of a wrong value
SteeringEntry = Annotated[
    InstanceOf[Steering],
    BeforeValidator(lambda value: value if isinstance(value, Steering) else Steering.from_json(value)),
    PlainSerializer(Steering.to_json),
]
"""An entry in the wire format: ``{"direction": "kind", "alpha": 8, ...}``."""


UnprovenModel = Literal["refuse", "experiment"]
"""What to do with a model that was never compared with Hugging Face, see ``SteerSettings.unproven_model``."""


class SteerSettings(BaseModel):
    """The settings of one engine.

    Attributes:
        layers: decoder blocks to hook (0-based, by block output). Only these can be steered or read.
        directions: direction files loaded at start-up, as absolute paths or ``hf://owner/repository/path``.
        max_directions: slots in the direction bank; each holds one direction, D float32 numbers.
        max_entries: most entries that one request may apply to one token at one layer.
        max_windows: most windows of one request that are steered each in its own way; the spans of its entries cut it
            into them.
        max_alpha: largest sum of |α| over the entries of a request that act on one token at one layer; of ``low`` and
            ``high``, the larger counts. What is in lengths of the stream (α of ``relative`` entries, α − 1 of
            ``scale``) counts that many times the layer's mean residual norm if ``residual_norms`` has it, else as it
            is.
        readout_store_mib: host memory, in MiB, for finished readouts that have not been collected yet.
        block_sums_mib: memory, in MiB on the model's device, for sums of the residual stream over KV blocks, with which
            a readout may take tokens of its span from the prefix cache; 0 keeps none.
        trace_columns: directions that can be traced at once, over all requests; each costs one number per token.
        max_rows: most vectors, tokens times layers, that one request may read with the pool ``rows``. With 0 no request
            can, and nothing is allocated for it. Otherwise each hooked layer holds one float32 row on the device for
            every token of a step (``max_num_batched_tokens``).
        served_aliases: additional model name of a server -> the steering that it applies. ``/v1/models`` lists them.
        steering_in_model_names: a server takes model names that say their steering, such as ``name@kind:8@12``, see
            ``vllm_steer.schema.steering_text``; for clients that can set nothing else.
        default_steering: steering of requests that do not mention steering, in process or over HTTP.
        registry_dir: folder in which a server keeps directions registered over HTTP; with ``None`` they are lost when
            the server ends.
        kept_readouts_mib: memory on disk, in MiB, for the readouts of finished replies, which a server gives by the
            reply's id to clients that dropped them; 0 keeps none.
        kept_readouts_seconds: how long each is kept.
        max_upload_mib: largest direction file that a server accepts over HTTP, in MiB.
        allowed_directions: alias, or ``key:`` and the first 12 hex digits of an API key's sha256 -> the directions it
            may name. Callers that are not listed may name any.
        max_alpha_residual_norm: largest Σ|α|·‖d‖ over the entries that act on one token at one layer, in multiples of
            the layer's mean residual norm, see ``residual_norms``. What is in lengths of the stream counts as it is.
        residual_norms: layer -> mean norm of the model's residual stream there, in the stream's own units.
        unproven_model: what to do with a model whose decoder layers were never compared with Hugging Face: ``refuse``
            it, or take the word of the ``experiment`` at start-up. Every readout then says so.
        playground: serve ``/v1/steering/playground``.
        plugin_build: digest of the plugin's own code. vLLM hashes this object into the key of its compile cache, so a
            graph that was compiled without the plugin, or with another version of it, is never reused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)]
    directions: tuple[str, ...] = ()
    max_directions: Annotated[int, Field(ge=1, le=65536)] = 256
    max_entries: Annotated[int, Field(ge=1, le=256)] = 8
    max_windows: Annotated[int, Field(ge=2, le=64)] = 8
    max_alpha: Annotated[float, Field(gt=0, le=1e30)] = 1000.0  # the tables hold α as float32
    readout_store_mib: Annotated[int, Field(ge=1)] = 512
    block_sums_mib: Annotated[int, Field(ge=0)] = 256
    trace_columns: Annotated[int, Field(ge=0, le=256)] = 8
    max_rows: Annotated[int, Field(ge=0, le=1 << 24)] = 0
    served_aliases: dict[str, tuple[SteeringEntry, ...]] = Field(default_factory=dict)
    steering_in_model_names: bool = False
    default_steering: tuple[SteeringEntry, ...] = ()
    registry_dir: str | None = None
    kept_readouts_mib: Annotated[int, Field(ge=0)] = 64
    kept_readouts_seconds: Annotated[float, Field(gt=0)] = 600.0
    max_upload_mib: Annotated[int, Field(ge=1)] = 64
    allowed_directions: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    max_alpha_residual_norm: Annotated[float, Field(gt=0)] | None = None
    residual_norms: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    unproven_model: UnprovenModel = "refuse"
    playground: bool = False
    plugin_build: str = ""

    @field_validator("layers")
    @classmethod
    def _sorted_once(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(layers)))

    @field_validator("directions", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str | os.PathLike) else value

    @model_validator(mode="after")
    def _bound_has_its_norms(self) -> Self:
        if self.max_alpha_residual_norm is not None and (lacking := set(self.layers) - set(self.residual_norms)):
            raise ValueError(f"max_alpha_residual_norm needs residual_norms of layers {sorted(lacking)} too; give them")
        if self.registry_dir is not None and not Path(self.registry_dir).is_absolute():
            raise ValueError(f"registry_dir {self.registry_dir!r} is relative; give an absolute path")
        return self

    @model_validator(mode="after")
    def _own_steering_can_be_admitted(self) -> Self:
        """Check the operator's steering as far as possible without the directions."""
        for who, entries in self.own_steering().items():
            if not entries:
                raise ValueError(f"{who} has no entries, so it would steer nothing; give it some, or remove it")
            for entry in entries:
                # A server's config may leave the layers to those of its directions, which are not known here.
                if entry.layer is not None and self.layers and entry.layer not in self.layers:
                    raise ValueError(f"{who} steers at layer {entry.layer}; hooked: {list(self.layers)}; hook it too")
            # An entry without a layer applies at its direction's own layer, unknown here, so it is checked alone.
            alone = [(entry,) for entry in entries if entry.layer is None]
            together = [
                tuple(one for number in here if (one := entries[number]).layer == layer)
                for _, here in spans.windows([one.span for one in entries], spans.LONG_PROMPT)
                for layer in self.layers
            ]
            total = max((sum(map(self.counted, here)) for here in (*alone, *together)), default=0.0)
            multiples = any(entry.is_multiple for entry in entries)
            if total > self.max_alpha:
                raise ValueError(
                    f"{who} has |alpha| of {total:g} at one layer{_HOW_COUNTED if multiples else ''}; allowed: "
                    f"max_alpha, {self.max_alpha:g}; raise it, or use smaller ones"
                )
        return self

    def counted(self, entry: Steering, layer: int | None = None) -> float:
        """What an entry counts towards ``max_alpha``, at the layer at which it acts; ``None`` for its own."""
        at = entry.layer if layer is None else layer
        return entry.multiplier * (self.residual_norms.get(at, 1.0) if entry.is_multiple and at is not None else 1.0)

    def own_steering(self) -> dict[str, tuple[Steering, ...]]:
        """The operator's steering, label for messages -> entries: each alias, and the default if there is one."""
        own = {f"alias {alias!r}": entries for alias, entries in self.served_aliases.items()}
        return own | ({"default_steering": self.default_steering} if self.default_steering else {})

    @classmethod
    def parse(cls, value: object) -> SteerSettings:
        """Read the ``vllm_steer`` object of ``additional_config``.

        Raises:
            SettingsError: a field is wrong; the message gives the first one, its value and the allowed values.
        """
        if not isinstance(value, Mapping):
            raise SettingsError(
                f"additional_config[{CONFIG_KEY!r}] is {type(value).__name__}; allowed: an object with "
                f"{', '.join(cls.model_fields)}. Build it with steer_config(...)."
            )
        try:
            settings = cls.model_validate(dict(value))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                known = [one for one in cls.model_fields if one != "plugin_build"]
                raise SettingsError(
                    f"there is no setting {name}.{near(name, known)} Allowed settings: {', '.join(known)}. Correct it "
                    "in steer_config(...)."
                ) from None
            # The value of a check of several settings, and of one that is missing, would be all settings.
            got = "" if isinstance(first["input"], Mapping) else f" is {repr(first['input'])[:_MOST_SHOWN]}"
            where = f"setting {name}{got}: " if name else ""
            raise SettingsError(f"{where}{message}. Correct it in steer_config(...).") from None
        return settings.model_copy(update={"plugin_build": plugin_build()})

    @classmethod
    def of(cls, additional_config: object) -> SteerSettings | None:
        """The settings in a vLLM ``additional_config``; ``None`` if steering is not configured.

        Raises:
            SettingsError: as ``parse``.
        """
        if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
            return None
        return cls.parse(additional_config[CONFIG_KEY])

    def as_config(self) -> dict[str, Any]:
        """The JSON object that ``parse`` reads back."""
        return self.model_dump(mode="json")


def steer_config(
    layers: Sequence[int],
    directions: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Build the ``additional_config`` that enables steering and readout.

    Args:
        layers: decoder blocks to hook, 0-based.
        directions: path of one direction file or folder, or ``hf://owner/repository/path``, or several of these; more
            directions can be registered at run time.
        **settings: any other field of ``SteerSettings``.

    Raises:
        SettingsError: ``SteerSettings`` does not allow a value, or ``VLLM_PLUGINS`` keeps this plugin from loading.

    Example:
        >>> steer_config([12, 8])["vllm_steer"]["layers"]
        [8, 12]
    """
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and CONFIG_KEY not in plugins.split(","):
        raise SettingsError(
            f"VLLM_PLUGINS is {plugins!r}, which keeps this plugin from loading, so the engine would not steer; "
            f"allowed: unset, or a list with {CONFIG_KEY}. Add it."
        )
    given = () if directions is None else directions
    files = given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    # Values that are not paths stay as they are; the schema refuses them.
    paths = tuple(direction_location(path) if isinstance(path, str | os.PathLike) else path for path in files)
    blocks = tuple(layers) if isinstance(layers, Sequence) else layers
    return {CONFIG_KEY: SteerSettings.parse({"layers": blocks, "directions": paths, **settings}).as_config()}


def direction_location(path: str | os.PathLike[str], folder: Path | None = None) -> str:
    """Where a direction file lies, for any process: its absolute path; addresses such as ``hf://`` stay as they are.

    Args:
        path: the file as somebody names it.
        folder: what a relative path starts from; None for the working directory.
    """
    named = os.fspath(path)
    return named if "://" in named else str((folder or Path()).joinpath(Path(named).expanduser()).resolve())


@cache
def plugin_build() -> str:
    """Version and code digest of the installed plugin, as ``0.1.0+<12 hex digits>``."""
    digest = sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
