"""The way of an adapter's maths into a copied module tree."""
