"""Other people's networks and schedulers on fastdiff's ops.

`import fastdiff` brings `patch`, `unpatch` and `compile_pass`, which need torch alone;
`fastdiff.integrations.diffusers` needs diffusers and is imported only where it is asked for.
"""
