r"""One-layer softmax attention under gradient flow, and the max-margin problems it tends to.

The model is that of Sheen, Chen, Wang & Zhou (arXiv 2403.08699): tokens :math:`x_{il}`, a query :math:`z_i` and a label
:math:`y_i` per example, a fixed head v, and trainable K and Q,

.. math::

    \Phi_i = v^\top X_i^\top \mathrm{softmax}(X_i W z_i), \qquad W = K Q^\top, \qquad
    \mathcal L = \tfrac1n \sum_i \ell(y_i \Phi_i) .

A token's score is :math:`\gamma_{il} = y_i v^\top x_{il}`. The loss falls to its infimum, which no finite weights
attain, as attention concentrates on one token s(i) of each example, and W grows without bound. In which direction?

* on K and Q apart: the paper's theorem, under assumptions, says to the W of least *nuclear* norm with margins
  :math:`(x_{i,s(i)} - x_{il})^\top W z_i \ge 1`;
* on W itself: to that of least *Frobenius* norm (Tarzanagh et al. 2023);
* on diagonal K and Q: to the diagonal of least ℓ1 norm (Theorem 4.1).

`data` draws problems, `flow` follows gradient flow, `recipe` is the published experiment, `svm` solves the max-margin
problems and `measures` compares the two. Everything is batched over data sets, on the leading axis.
"""
