"""``cutlayer demo``: the main job on real data, with real processes, on one machine."""
