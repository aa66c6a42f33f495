"""How an adapter's maths gets into a copied module tree."""
