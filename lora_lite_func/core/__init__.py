"""Values and contracts: errors, configs, adapters, the contract of a method. Knows no layer and no model."""
