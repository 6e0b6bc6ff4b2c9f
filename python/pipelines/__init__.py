"""Passes with files between them, from image-level tags to scored masks, and the command line `fastcam` over them.

Each pass is a module with a function of its name: `from fastcam.pipelines.make_cam import make_cam`. It skips what is
finished, writes whole files only, and refuses to mix output of two configurations in one folder.
"""
