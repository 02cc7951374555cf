"""Sections of an experiment: network, diffusion process and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.yaml_files import Section
from pipeline.errors import UsageError

TABLE = "table"  # the schedule that is given as a table of betas
MAX_TABLE_BYTES = 1 << 22

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


OWN_TYPES = ("unet", "vae")  # networks of this package


def settings_of(kind: str) -> set[str]:
    """Return the settings that a type of network reads besides `type` and `arguments`."""
    if kind == "unet":
        return set(ModelConfig.model_fields) - {"type", "arguments", "latent_dim"}
    return {"channels", "channel_multipliers", "norm_groups", "latent_dim"} if kind == "vae" else {"class_conditional"}


class ModelConfig(Section):
    """The network: the paper's U-Net, `package.module:Class` called with `arguments`, or `vae`, the model to compare with.

    The defaults are the U-Net of Ho et al.; a type's settings are refused with another type.
    """

    type: str = "unet"
    """Network: `unet`, `vae`, or your own as `package.module:Class`."""
    channels: PositiveInt = 128
    """Channels of the first level."""
    channel_multipliers: tuple[PositiveInt, ...] = Field(default=(1, 2, 2, 2), min_length=1)
    """Channels of each level, as multiples of `channels`; each level halves the size."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks of each level."""
    attention_resolutions: tuple[PositiveInt, ...] = (16,)
    """Sizes in pixels (the longer side) of the levels that have self-attention."""
    num_heads: PositiveInt = 1
    """Heads of the attention, unless `head_channels` is given; Nichol & Dhariwal: 4."""
    head_channels: PositiveInt | None = None
    """Channels of one head, instead of `num_heads`."""
    dropout: Fraction = 0.1
    """Dropout in residual blocks."""
    norm_groups: PositiveInt = 32
    """Groups of the group norms."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of the group norms; Nichol & Dhariwal: 1e-5."""
    scale_shift_norm: bool = False
    """Whether the time embedding scales and shifts the norms; Nichol & Dhariwal: true."""
    flip_sin_to_cos: bool = False
    """Whether the time embedding begins with its cosines; Nichol & Dhariwal: true."""
    freq_shift: Literal[0, 1] = 1
    """Shift in the frequencies of the time embedding; Nichol & Dhariwal: 0."""
    downsample_padding: Literal[0, 1] = 0
    """Padding where the size is halved: 0 pads right and bottom, 1 all sides; Nichol & Dhariwal: 1."""
    class_conditional: bool = False
    """Whether the network is given the class of an image."""
    latent_dim: PositiveInt = 16
    """Size of the VAE's latent code."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of a network of your own."""

    @model_validator(mode="after")
    def _one_kind(self) -> ModelConfig:
        if self.head_channels is not None and self.num_heads != 1:
            raise ValueError("num_heads and head_channels both say how many heads there are; give one of them")
        if self.type in OWN_TYPES:
            if self.arguments:
                raise ValueError(
                    f"'arguments' belong to a network of your own; with type {self.type!r} set its keys directly"
                )
            self._refuse_unread(settings_of(self.type), "leave them out")
            return self
        module, colon, name = self.type.partition(":")
        parts = module.split(".")
        if not colon or not name.isidentifier() or not all(part.isidentifier() for part in parts):
            raise ValueError(f"type: got {self.type!r}; expected 'unet', 'vae' or 'package.module:Class'")
        self._refuse_unread(settings_of(self.type), f"give {self.type} its settings under 'arguments'")
        return self

    def _refuse_unread(self, read: set[str], what_to_do: str) -> None:
        """Refuse settings that this type of network would not read."""
        fields = type(self).model_fields
        unread = sorted(
            k for k in fields.keys() - read - {"type", "arguments"} if getattr(self, k) != fields[k].default
        )
        if unread:
            owner = next((kind for kind in OWN_TYPES if settings_of(kind).issuperset(unread)), "unet")
            raise ValueError(f"{', '.join(unread)} belong to type {owner!r}; {what_to_do}")


class DiffusionConfig(Section):
    """The diffusion process, in the names of the `ddpm` package.

    A schedule is one of ddpm.SCHEDULES, or a table of betas. The numbers of `betas_file` are read into `betas` with the experiment,
    so that a run contains them.
    """

    schedule: str = "linear"
    """Noise schedule, such as linear, cosine or sigmoid: `ddpm-pipe schedule` compares them; `table` with a table of betas."""
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    """Number of timesteps T; with a table its length."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that no signal is left at T (Lin et al. 2023)."""
    betas_file: str | None = None
    """Text file of numbers, one beta a step, instead of a schedule; relative to the experiment's file."""
    betas: tuple[float, ...] | None = None
    """The same as a list; filled in from `betas_file`."""
    prediction: Literal["eps", "x0", "v", "x_prev"] = "eps"
    """What the network predicts."""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_large"
    """Variance of a reverse step; `learned_range` doubles the network's channels."""
    clip_x0: bool = True
    """Clip the predicted image to [-1, 1] while sampling."""

    @model_validator(mode="before")
    @classmethod
    def _table_decides(cls, content: Any) -> Any:
        """A table of betas is the schedule, and its length is T, where these are not given."""
        if isinstance(content, dict) and isinstance(content.get("betas"), list | tuple):
            return {"schedule": TABLE, "num_timesteps": len(content["betas"])} | content
        return content

    @model_validator(mode="after")
    def _one_schedule(self) -> DiffusionConfig:
        if self.betas is None:
            if self.schedule == TABLE:
                raise ValueError("schedule 'table' needs its betas; give diffusion.betas_file, a text file of numbers")
            return self
        if self.schedule != TABLE:
            raise ValueError(f"schedule {self.schedule!r} and a table of betas are both given; leave one of them out")
        if self.num_timesteps != len(self.betas):
            raise ValueError(
                f"num_timesteps: got {self.num_timesteps}, but the table has {len(self.betas)} betas; leave num_timesteps out"
            )
        return self


def _as_text(value: object) -> str:
    """Convert a class name to text: a number by its digits. The spelling of true and null is lost, so these are refused."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"got {value!r}; expected the name of a class, '#balanced', '#none', or a number as '#3', quoted in YAML"
        )
    return text


class SamplingConfig(Section):
    """How images are generated."""

    sampler: Literal["ddim", "ancestral", "dpm_solver"] = "ddim"
    """Sampler: DDIM, Algorithm 2 of Ho et al., or DPM-Solver++."""
    steps: PositiveInt | None = 50
    """Timesteps along one image; null is all T, which `ancestral` takes if nothing is given."""
    spacing: Literal["trailing", "linspace", "leading", "quad"] = "trailing"
    """How these timesteps are spaced."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """DDIM's noise: 0 is none, 1 is as much as `ancestral` adds."""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance s = 1 + w: 1 is none."""
    labels: Annotated[str, BeforeValidator(_as_text)] = "#balanced"
    """Class of each image where the model knows classes: "#balanced" (in turn), "#none", a name, or a number as "#3"."""
    batch_size: PositiveInt = 32
    """Images computed at once; files are byte-equal only for an equal one."""
    precision: Literal["mixed", "bf16", "fp32"] = "mixed"
    """Arithmetic of the network, weights included. `mixed` is bf16 where the hardware computes it, else fp32."""
    compile: bool = False
    """Compile the network with torch.compile."""

    @model_validator(mode="before")
    @classmethod
    def _ancestral_takes_all_steps(cls, content: Any) -> Any:
        """Algorithm 2 uses all T steps by default, in a file as on the command line."""
        if isinstance(content, dict) and content.get("sampler") == "ancestral":
            return {"steps": None} | content
        return content

    def num_steps(self, num_timesteps: int) -> int:
        """Return the number of timesteps along one image: `steps`, or all T."""
        return min(self.steps or num_timesteps, num_timesteps)


def take_in_betas(content: dict[str, Any], base: Path) -> None:
    """Read the file that `diffusion.betas_file` names, relative to `base`, and put its numbers beside it; UsageError if it cannot be."""
    diffusion = content.get("diffusion")
    if not isinstance(diffusion, dict) or diffusion.get("betas_file") is None or diffusion.get("betas") is not None:
        return  # a resolved experiment holds the numbers already
    path = base / Path(str(diffusion["betas_file"])).expanduser()
    diffusion["betas"] = read_betas(path)
    diffusion["betas_file"] = path.name


def read_betas(path: Path) -> list[float]:
    """Return the numbers of a text file: separated by white space, commas or lines, or a JSON list; `#` begins a comment."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise UsageError(f"{path}: too large for a table of betas; give a text file with one number per step")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"diffusion.betas_file: {path} cannot be read ({error.strerror}); give a text file with one number per step"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"diffusion.betas_file: {path} is not text; write one number per step") from None
    lines = [line.partition("#")[0] for line in text.splitlines()]
    words = " ".join(lines).replace(",", " ").strip().removeprefix("[").removesuffix("]").split()
    betas: list[float] = []
    for word in words:
        try:
            betas.append(float(word))
        except ValueError:
            raise UsageError(f"diffusion.betas_file: {path} holds {word!r}; expected numbers, one per step") from None
    if len(betas) < 2:
        raise UsageError(f"diffusion.betas_file: {path} holds {len(betas)} numbers; expected one per step, at least 2")
    return betas
