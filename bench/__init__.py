"""Benchmarks of fusedrnn against torch.nn, ONNX Runtime and OpenVINO: run ``python -m bench``."""
