"""The settings of ``python -m fastdiff.sample``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Field docstrings are the help texts of ``python -m fastdiff.sample``."""

    run: str
    """Run folder, e.g. runs/digits."""
    ema: float | None = None
    """Which of the run's averages of its weights, by its decay; of a run with --posthoc-ema also
    any relative length up to 0.288 (0.05: of 5 % of the training). None: the first."""
    sampler: str = "ddim"
    """How to sample: ddim, ddpm, probability_flow, heun, dpm_solver_pp, reverse_sde,
    annealed_langevin or predictor_corrector."""
    steps: int | None = None
    """Number of timesteps visited, out of those the run was trained with; None: 50, or all that
    it has."""
    eta: float = 0.0
    """DDIM only: 0 is deterministic, 1 adds as much noise as DDPM."""
    sigma_hat: bool = False
    """DDIM only: the larger noise of DDPM's own variance (DDIM app. D.3)."""
    spacing: str | None = None
    """Which timesteps are visited: leading, linspace, trailing, quadratic, logsnr, or IDDPM
    sections such as "100,50,25" (which set the number of steps themselves). None: leading, or
    logsnr for dpm_solver_pp and annealed_langevin."""
    inner_steps: int | None = None
    """annealed_langevin: Langevin steps per noise level; predictor_corrector: corrector steps per
    timestep. None: the sampler's default."""
    step_size: float | None = None
    """annealed_langevin: size of a Langevin step, as a share of the noise level's variance (0 to
    4); None: 0.5."""
    sde_method: str | None = None
    """reverse_sde: euler_maruyama or reverse_diffusion; None: the former."""
    image: str | None = None
    """Inpainting: the image of which a part is drawn anew, an image file (cropped and resized as
    the run's own) or the number of one of the run's training images."""
    mask: str | None = None
    """With --image, what is drawn anew: left, right, top, bottom or centre, or an image file that
    is white there."""
    resamples: int = 1
    """With --image: how often each group of steps is taken (RePaint); more fit the rest better."""
    guidance_scale: float | None = None
    """Class-conditional runs: scale of classifier-free guidance; 0: unconditional, 1: as trained,
    above 1: more like the class asked for."""
    guidance_rescale: float = 0.0
    """With --guidance-scale: how far (0 to 1) contrast is scaled back to that of scale 1."""
    classifier_scale: float | None = None
    """Scale of classifier guidance towards --class-label, or all classes in turn, for runs on
    images with classes. The classifier is trained once and kept in the run folder."""
    dynamic_threshold: float | None = None
    """Scale an image whose predicted pixels leave [-1, 1] instead of clipping it: the percentile
    (in 0..1; Imagen's is 0.995) of the pixels that is to fit. None: clip."""
    num: int = 64
    """Number of images."""
    seed: int = 0
    """Seed of the noise."""
    class_label: int | None = None
    """Class-conditional runs: the class of every image; None: all classes in turn."""
    batch_size: int = 256
    """Images at a time; changes memory and speed, not the images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: a GPU when there is one."""
    amp: Literal["off", "bf16", "fp16"] | None = None
    """Compute under autocast in bfloat16 or float16; None: as the run was trained."""
    channels_last: bool | None = None
    """Whether to keep weights and images in channels_last memory format; None: as the run was
    trained."""
    compile: bool | None = None
    """Whether to compile the U-Net with torch.compile; None: as the run was trained."""
    inference_form: bool = True
    """On a CPU: compute the U-Net in its inference form, which is faster and the same to rounding
    (with --amp bf16: bfloat16 throughout)."""
    cuda_graph: bool = False
    """On a GPU: launch the U-Net's hundreds of kernels as one, which is what small batches wait
    for."""
    out: str | None = None
    """Where to write: a picture of all images (.png, .jpg), an animation of it at every step
    (.gif), or an .npz with arr_0, uint8 (N, H, W, C), and for class-conditional runs arr_1, the
    classes. None: a .png in RUN/samples."""
    force: bool = False
    """Overwrite --out if it exists."""
