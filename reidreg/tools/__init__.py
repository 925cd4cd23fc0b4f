"""Commands beside training and evaluation: checks of the machine, import of configurations.

The doors are `doctor.examine`, and `import_yacs.import_config` with `import_yacs.render`.
"""
