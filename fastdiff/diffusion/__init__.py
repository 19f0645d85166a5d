"""The mathematics of diffusion: schedules, processes, losses, bounds and guidance (Math §2-§8)."""
