//! The base model's adaptable linear layers: what an adapter may bind to.

use std::collections::BTreeMap;

use crate::layout::NUM_GROUPS;
use crate::slice::AdapterSlice;

/// One linear layer, the same in every layer of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleShape {
    /// Fused projection it belongs to: 0 qkv, 1 o, 2 `gate_up`, 3 down.
    pub group: usize,
    pub in_features: usize,
    pub out_features: usize,
    /// First column in the fused output.
    pub out_offset: usize,
    pub has_bias: bool,
}

/// Layers and modules of a base model, by path inside a layer (`self_attn.q_proj`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseShape {
    pub num_layers: usize,
    /// Rows and columns of embedding and head, where they are known.
    pub tokens: Option<[usize; 2]>,
    pub modules: BTreeMap<String, ModuleShape>,
    /// Parts that ranks compute, where the model is shared out.
    pub slices: Vec<AdapterSlice>,
}

impl BaseShape {
    /// Builds a shape, or says in words why these modules do not form one.
    pub fn new(
        num_layers: usize,
        modules: impl IntoIterator<Item = (String, ModuleShape)>,
    ) -> Result<Self, String> {
        let mut by_path = BTreeMap::new();
        for (path, module) in modules {
            check_module(&path, &module)?;
            if by_path.insert(path.clone(), module).is_some() {
                return Err(format!("module {path} is listed twice"));
            }
        }
        check_groups(&by_path)?;
        if num_layers == 0 || by_path.is_empty() {
            return Err("a base shape needs at least one layer and one module".into());
        }
        Ok(Self {
            num_layers,
            tokens: None,
            modules: by_path,
            slices: Vec::new(),
        })
    }

    /// Modules of one group, in the order of their output columns.
    pub fn group(&self, group: usize) -> Vec<(&str, &ModuleShape)> {
        let of_group = self
            .modules
            .iter()
            .filter(|(_, module)| module.group == group);
        let mut modules: Vec<_> = of_group
            .map(|(path, module)| (path.as_str(), module))
            .collect();
        modules.sort_by_key(|(_, module)| module.out_offset);
        modules
    }
}

fn check_module(path: &str, module: &ModuleShape) -> Result<(), String> {
    if module.group >= NUM_GROUPS {
        return Err(format!(
            "module {path} names group {}, groups are 0 to {}",
            module.group,
            NUM_GROUPS - 1
        ));
    }
    if module.in_features == 0 || module.out_features == 0 {
        return Err(format!("module {path} has no features"));
    }
    Ok(())
}

/// Modules of a group read the same input.
fn check_groups(modules: &BTreeMap<String, ModuleShape>) -> Result<(), String> {
    let mut in_features = [None; NUM_GROUPS];
    for (path, module) in modules {
        let expected = *in_features[module.group].get_or_insert(module.in_features);
        if module.in_features != expected {
            return Err(format!(
                "module {path} has in_features {}, its group {} has {expected}",
                module.in_features, module.group
            ));
        }
    }
    Ok(())
}
