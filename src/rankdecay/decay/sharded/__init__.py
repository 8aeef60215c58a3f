r"""The same decay where a parameter is a DTensor: FSDP2, HSDP, tensor parallelism and their combinations.

A low-rank decay has to know the whole spectrum of a matrix of which each process holds a piece. There are three ways,
chosen for each parameter from its shape and placements alone, so that all processes choose the same
(:func:`~rankdecay.decay.sharded.layout.local_piece`):

* **whole**: every matrix is whole in some process: experts, heads that fall inside one shard, replicated parameters.
  Nothing is communicated.
* **sums**: one side is cut, and it is by far the longer one. The Gram matrix of the other side is the sum of those of
  the pieces, and the step multiplies each piece by a matrix C that depends on the Gram matrix alone
  (:mod:`rankdecay.linalg.gram`). Gram matrices of one size travel together: a reduce-scatter gives each process its
  share of the sums to decompose, an all-gather hands round the C, which moves the bytes of one all-reduce.
* **redistribute**: otherwise each matrix, or head, goes to one owner, which decays it as if it were alone; owners are
  chosen so that all have as much to do. One all-to-all there and one back for many matrices.

A process sends 16 n² bytes for a sum and about 8 mn/P to redistribute float32 among P processes, so that square
matrices are redistributed and a sum is for m ≥ 2nP. Mesh dimensions that replicate, as in HSDP, take no part in either:
each replica does the same. L2 is elementwise and always local.
"""
