"""What the speed-of-light page looks at."""

from __future__ import annotations

from benchmarks.speed_of_light.rivals import Case

# Layers of published networks: (network, channels, side, batch).
SITES = (
    ("ddpm_cifar10", 128, 32, 128),
    ("ddpm_cifar10", 256, 16, 128),
    ("ddpm_cifar10", 256, 8, 128),
    ("ddpm_cifar10", 256, 16, 1),
    ("ddpm_256", 128, 256, 4),
    ("vae", 512, 64, 1),
)

# The shapes of the league, as (batch, channels, side); 32 groups.
LEAGUE = ((128, 128, 32), (128, 256, 16), (4, 128, 256))


def _league() -> list[tuple[str, Case]]:
    found = []
    for rival in ("sglang", "sglang channels_last", "liger", "flag-gems", "inductor"):
        for batch, channels, side in LEAGUE:
            for layout in ("nchw", "channels_last"):
                # The others copy to NCHW first, or take nothing else.
                takes = {"inductor": True, "sglang channels_last": layout == "channels_last"}
                if not takes.get(rival, layout == "nchw"):
                    continue
                for which in ("forward", "backward"):
                    if which == "backward" and rival.startswith("sglang"):
                        continue
                    shape = (batch, channels, side, side)
                    found.append(("sm_90", Case(rival, shape, 32, "bf16", layout, which)))
    return found


# Of the measurements in `published`: with the architecture that they were made on.
CALIBRATION = [
    ("sm_90", Case("sglang", (1, 128, 20, 256, 256), 32, "bf16")),
    ("sm_90", Case("sglang", (1, 512, 16, 180, 320), 32, "bf16")),
    *(
        ("sm_90", Case(rival, shape, 32, "bf16"))
        for shape in ((1, 512, 8, 45, 80), (1, 512, 16, 90, 160))
        for rival in ("sglang", "sglang one pass")
    ),
    *(
        ("sm_100", Case("liger", (128, channels, 512), channels // 4, "fp32", which=which))
        for channels in (32, 128, 512, 1024, 2048)
        for which in ("forward", "backward")
    ),
    *(("sm_100", Case("liger", (batch, 4096, 512), 1024, "bf16")) for batch in (2, 4, 8, 16)),
]
RIVAL_CASES = [*CALIBRATION, *_league()]
