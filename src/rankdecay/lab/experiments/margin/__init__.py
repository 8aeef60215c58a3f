"""Max-margin problems of softmax attention under gradient flow."""
