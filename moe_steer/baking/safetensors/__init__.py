"""The container of a folder with config.json and safetensors files."""
