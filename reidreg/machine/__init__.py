"""What the computer has: devices, cores, memory, and the place of this process among its ranks.

Other packages use `world` (`World`, `world_from_env`), `devices` (`choose_device`,
`choose_precision`, `on_device`, `autocast`), `cores`, `memory`, `gpu_memory`, and two workarounds
that are to go once they are not needed, `malloc` and (through `devices.autocast`) `onednn`.
"""
