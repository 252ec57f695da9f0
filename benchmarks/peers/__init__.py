"""What a user would run instead, written as each library's own documentation has it.

``benchmarks/speed.py`` runs these beside this project. All train the same ResNet with the same
optimizer, batches and augmentation on the real images, and write their figures alike
(``workload.py``). Each is a script of its own: PyTorch's runs in another environment.
"""
