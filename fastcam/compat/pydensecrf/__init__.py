"""pydensecrf's interface on fastcam's lattice.

``import fastcam.compat.pydensecrf.densecrf as dcrf`` and ``from fastcam.compat.pydensecrf import utils`` in place of
``pydensecrf``; nothing else changes. ``docs/compat.md`` lists what differs.
"""
