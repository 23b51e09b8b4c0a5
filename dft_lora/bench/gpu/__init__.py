"""`python -m dft_lora.bench gpu`: what this project claims of a GPU, proven in ten minutes.

run.py        the driver: each stage in a process of its own, its results recorded as they come
stages.py     the list of stages, in order
lab.py        what stages share: bases of random weights, invented text, time and memory
exact.py      float16, bfloat16, kill and resume: the same numbers as on the CPU
loss.py       the loss against its peers; the Triton kernel
steps.py      training steps, the memory ladder, memory predicted and real, retreat, unsloth
answers.py    decoding and a GRPO step

No download and no network: embedded base, random weights of real shapes, invented text.
"""
