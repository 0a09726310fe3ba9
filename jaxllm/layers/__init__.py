"""The building blocks of every model. Axis letters in einsum strings, annotations and comments, here and everywhere:

B batch    T query position    S key or cache position    D model width    V vocabulary    L layers
N query heads    K key/value heads    G = N / K    H head width    F ffn width
U head width of values    C latent of keys and values, with their rotated part
E experts    A experts per token    M tokens of a batch in one row
"""
