"""Quantised weights in checkpoints: which tensors they are, and the weights they stand for.

May import: errors, untrusted. Start reading at `find.find_quantised`:
find                the quantised weights of a checkpoint, by kind
weight              what a quantised weight of any kind offers
refusals            formats that are refused, by name
eight_bit           codes of 8 bits with scales beside them
four_bit            bitsandbytes, 4 bit, read by that library
packed              compressed-tensors, packed, read by that library
awq                 AWQ, converted to packed weights by compressed-tensors
imports             imports a library that reads a format
"""
