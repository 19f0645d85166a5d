"""Which limit each GPU kernel meets first, predicted without a GPU; writes docs/speed_of_light.md.

model       limits of a launch on a device, from counts
counts      the counts, by the PTX emulator, kept in benchmarks/speed_of_light/counts.json
cases       what is counted
rivals      other packages' kernels, run as installed
published   measurements by others, and how far the model is from them
page        the page
"""
