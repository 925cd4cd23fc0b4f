"""A gallery stored on disk, and nearest-neighbour search in it.

Door: `gallery.GalleryIndex` and `gallery.add_to_index`; `records` for what an index stores beside
its items; `source` for features of a file, or of images by a checkpoint; `files.holds_index`.
"""
