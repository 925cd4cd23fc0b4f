"""What an author of a part works with: the kinds of part, their registries, and plugins.

The door is `interfaces` (the six abstract classes and their registries), `registry.Registry`,
`plugins.load_plugins`, and `schema`, which reads a constructor's signature as a schema of options.
"""
