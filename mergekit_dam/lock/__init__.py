"""The lock of a merge: what it was made from and what came out, as digests.

May import: coefficients and what stands below. Start reading at `schema`:
schema     what the file holds
folder     digests of the files and tensors of a merged model
"""
