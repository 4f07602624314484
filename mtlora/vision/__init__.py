"""Images: a frozen vision backbone, and what a task of images is.

image_input.py  how an image becomes a task's input
images.py       how an encoded one becomes an encoder's input
families.py     the families of vision backbones: their configurations and weights in one form
encoder.py      one plain torch encoder for all families
onnx_file.py    tensors of an ONNX file, which the default backbone comes in
prepare.py      the default backbone's folder
heads.py        linear heads of many tasks
"""
