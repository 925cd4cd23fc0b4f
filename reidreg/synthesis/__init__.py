"""Drawn re-identification data: pedestrians before cameras, in the layouts of real data sets.

For trying every command without data, and for tests. The door is `dataset.synthesize`; `plan.plan`
lists the images of a data set, and `crops` draws each of them from its seed and numbers alone.
"""
