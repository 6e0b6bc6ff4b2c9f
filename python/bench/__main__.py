"""``python -m fastcam.bench [op ...]``: time every op against what people use instead."""

from fastcam.bench._harness import main

main()
