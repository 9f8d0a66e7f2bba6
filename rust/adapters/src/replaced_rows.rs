//! Rows of the base's embedding and head that an adapter replaces: found by comparing with the base, row by row.
//! What says what the base says is left out, so that a frozen copy costs nothing.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use safetensors::tensor::TensorInfo;

use crate::base_weights::{BaseWeights, DIGEST_NBYTES, StoredWeight};
use crate::error::{Error, Result};
use crate::layout::StorageDtype;
use crate::matrix::store;
use crate::pace::Bursts;
use crate::tables::{Table, Tables};
use crate::tensor_name::TokenModule;
use crate::weights::{Source, Weights};

/// Bytes of a table read at a time: a burst.
const PIECE_NBYTES: usize = 512 << 10;
/// Tokens beyond the base's, up to a round number above what is added in practice.
const MAX_ADDED_TOKENS: usize = 4096;
/// `count` tokens from `token` on, whose rows are those of a table of the file from `row` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowRun {
    pub token: u32,
    pub count: u32,
    table: usize,
    row: u32,
}

/// What `check` finds, so that a load reads these rows and no others; tokens ascend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplacedRows {
    pub embedding: Vec<RowRun>,
    pub head: Vec<RowRun>,
    /// Tokens of the base, where it was asked.
    base_vocabulary: usize,
    /// Tokens of the head, where those are not the base's.
    pub vocabulary: Option<usize>,
}

/// Rows of one block of an extent.
pub(crate) struct RowBlock<'a> {
    pub(crate) runs: &'a [RowRun],
    pub(crate) of_embedding: bool,
    pub(crate) of_head: bool,
}

/// Some neighbouring rows, read.
pub(crate) struct Rows<'a> {
    /// Place of the first in the block.
    pub(crate) first: usize,
    /// Elements of the tensor before them.
    pub(crate) num_before: usize,
    /// [rows, width]
    pub(crate) source: &'a Source,
    pub(crate) bytes: &'a [u8],
    /// Whether they are the last of their run.
    pub(crate) ends_run: bool,
}

pub(crate) fn count(runs: &[RowRun]) -> usize {
    runs.iter().map(|run| run.count as usize).sum()
}

/// The tokens of all runs.
pub(crate) fn tokens(runs: &[RowRun]) -> impl Iterator<Item = u32> {
    runs.iter().flat_map(|run| run.token..run.token + run.count)
}

impl RowBlock<'_> {
    /// Whose rows they are.
    pub(crate) fn name(&self) -> &'static str {
        match (self.of_embedding, self.of_head) {
            (true, true) => "embedding and head",
            (true, false) => "embedding",
            (false, _) => "head",
        }
    }
}

impl ReplacedRows {
    /// Compares a file's tables with the base, both as they are stored.
    pub(crate) fn find(
        tables: &Tables,
        weights: &mut Weights,
        storage: StorageDtype,
        base: Option<&dyn BaseWeights>,
        bursts: &mut Bursts<'_>,
    ) -> Result<Self> {
        let Some(first) = tables.all.first() else {
            return Ok(Self::default());
        };
        let stored = |table: &Table, module: TokenModule| {
            let unchecked = |reason: String| Error::CopyUnchecked {
                tensor: table.source.name.clone(),
                module: module.name(),
                reason,
            };
            let base =
                base.ok_or_else(|| unchecked("the base's weights are not at hand".into()))?;
            base.stored(module.name()).map_err(unchecked)
        };
        let StoredWeight { is_tied, shape, .. } = stored(first, first.module)?;
        if is_tied {
            tables.check_tied()?;
        }
        let [embedding, head] = TokenModule::BOTH.map(|module| tables.layers(module, is_tied));
        let mut runs = |module: TokenModule, layers: &[usize]| match layers.first() {
            Some(layer) => {
                let base = stored(&tables.all[*layer], module)?;
                runs_of(tables, layers, weights, storage, &base, bursts)
            }
            None => Ok(Vec::new()),
        };
        let of_embedding = runs(TokenModule::Embedding, &embedding)?;
        let of_head = if is_tied && embedding == head {
            of_embedding.clone()
        } else {
            runs(TokenModule::Head, &head)?
        };
        let found = Self {
            vocabulary: vocabulary(tables, &head, shape[0]),
            base_vocabulary: shape[0],
            embedding: of_embedding,
            head: of_head,
        };
        found.check_added(tables)?;
        tables.check_invocation(!found.is_empty())?;
        Ok(found)
    }

    /// Tokens beyond the base's that have an embedding.
    pub fn added_tokens(&self) -> impl Iterator<Item = u32> {
        self.beyond(&self.embedding)
    }

    /// Those that have a row of the head too.
    pub fn added_head_tokens(&self) -> impl Iterator<Item = u32> {
        self.beyond(&self.head)
    }

    fn beyond(&self, runs: &[RowRun]) -> impl Iterator<Item = u32> {
        let base = self.base_vocabulary as u32;
        let first = runs.partition_point(|run| run.token + run.count <= base);
        tokens(&runs[first..]).filter(move |token| *token >= base)
    }

    /// What a head may choose must have an embedding, and is bounded: every step's logits are as wide.
    fn check_added(&self, tables: &Tables) -> Result<()> {
        let (base, limit) = (
            self.base_vocabulary,
            self.base_vocabulary + MAX_ADDED_TOKENS,
        );
        let known: HashSet<u32> = self.added_tokens().collect();
        for (runs, is_head) in [(&self.embedding, false), (&self.head, true)] {
            let refuse = |token: u32, reason: String| {
                let run = runs.iter().rfind(|run| run.token <= token);
                let run = run.expect("a token is in a run");
                tables.all[run.table].refuse(format!("it has a row of token {token}, {reason}"))
            };
            for token in self.beyond(runs) {
                if token as usize >= limit {
                    let reason = format!(
                        "the base has {base} tokens and an adapter may add {MAX_ADDED_TOKENS}"
                    );
                    return Err(refuse(token, reason));
                }
                if is_head && !known.contains(&token) {
                    let reason = "for which neither the base nor the adapter has an embedding";
                    return Err(refuse(token, reason.into()));
                }
            }
        }
        Ok(())
    }

    /// Whether the tables have all these rows, as they had when they were found.
    pub(crate) fn fit(&self, tables: &Tables) -> bool {
        let fits = |run: &RowRun| {
            let table = tables.all.get(run.table);
            table.is_some_and(|table| (run.row + run.count) as usize <= table.rows())
        };
        let mut widths = self
            .runs()
            .filter_map(|run| tables.all.get(run.table))
            .map(Table::width);
        let first = widths.next();
        self.runs().all(fits) && widths.all(|width| Some(width) == first)
    }

    /// Rows that both have are in one block.
    pub(crate) fn blocks(&self) -> Vec<RowBlock<'_>> {
        let block = |runs, of_embedding, of_head| RowBlock {
            runs,
            of_embedding,
            of_head,
        };
        let blocks = if self.embedding == self.head {
            vec![block(&self.embedding[..], true, true)]
        } else {
            vec![
                block(&self.embedding[..], true, false),
                block(&self.head[..], false, true),
            ]
        };
        let has_rows = |block: &RowBlock<'_>| !block.runs.is_empty();
        blocks.into_iter().filter(has_rows).collect()
    }

    /// Columns of the rows, which all tables of an adapter share.
    pub(crate) fn width(&self, tables: &Tables) -> usize {
        let mut runs = self.runs();
        runs.next().map_or(0, |run| tables.all[run.table].width())
    }

    /// The tables whose rows these are.
    pub(crate) fn used<'a>(&self, tables: &'a Tables) -> impl Iterator<Item = &'a Table> {
        let used: HashSet<usize> = self.runs().map(|run| run.table).collect();
        let tables = tables.all.iter().enumerate();
        tables
            .filter(move |(index, _)| used.contains(index))
            .map(|(_, table)| table)
    }

    /// Names of the modules whose tables say what the base says.
    pub(crate) fn copies(&self, tables: &Tables) -> Vec<String> {
        let names = |tables: &mut dyn Iterator<Item = &Table>| {
            tables
                .map(|table| table.module.name())
                .collect::<BTreeSet<_>>()
        };
        let used = names(&mut self.used(tables));
        let whole = |table: &&Table| table.tokens.is_none();
        let found = names(&mut tables.all.iter().filter(whole));
        found.difference(&used).map(|name| (*name).into()).collect()
    }

    /// Whether anything of the head is other than the base's.
    pub(crate) fn replaces_head(&self) -> bool {
        !self.head.is_empty() || self.vocabulary.is_some()
    }

    /// Whether all is as the base has it.
    pub fn is_empty(&self) -> bool {
        self.runs().next().is_none() && self.vocabulary.is_none()
    }

    /// What there is, in words.
    pub(crate) fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for block in self.blocks() {
            let (name, count) = (block.name(), count(block.runs));
            notes.push(format!("{name}: {count} rows in place of the base's"));
        }
        if let Some(vocabulary) = self.vocabulary {
            let base = self.base_vocabulary;
            notes.push(format!(
                "vocabulary: {vocabulary} tokens, the base has {base}"
            ));
        }
        notes
    }

    fn runs(&self) -> impl Iterator<Item = &RowRun> {
        self.embedding.iter().chain(&self.head)
    }
}

/// Tokens of a head of these layers, where those are not the base's.
fn vocabulary(tables: &Tables, layers: &[usize], base_rows: usize) -> Option<usize> {
    let tables = || layers.iter().map(|layer| &tables.all[*layer]);
    let whole = tables().find(|table| table.tokens.is_none());
    let rows = whole.map_or(base_rows, Table::rows);
    let tokens = tables().filter_map(|table| table.tokens.as_ref()?.last());
    let ends = tokens.map(|(token, _)| *token as usize + 1);
    let vocabulary = ends.fold(rows, usize::max);
    (vocabulary != base_rows).then_some(vocabulary)
}

/// The rows of some layers that differ from the base's.
fn runs_of(
    tables: &Tables,
    layers: &[usize],
    weights: &mut Weights,
    storage: StorageDtype,
    base: &StoredWeight,
    bursts: &mut Bursts<'_>,
) -> Result<Vec<RowRun>> {
    let mut found = Vec::new();
    for (place, index) in layers.iter().enumerate() {
        let table = &tables.all[*index];
        check_width(table, base)?;
        let above = layers[place + 1..].iter().map(|index| &tables.all[*index]);
        let hidden: HashSet<u32> = above
            .flat_map(|table| table.tokens.iter().flatten().map(|(token, _)| *token))
            .collect();
        let mut compare = |token: u32, row: u32, stored: &[u8]| {
            let start = token as usize * DIGEST_NBYTES;
            let digest = base.digests.get(start..start + DIGEST_NBYTES);
            let is_equal = digest.is_some_and(|digest| blake3::hash(stored).as_bytes() == digest);
            if !hidden.contains(&token) && !is_equal {
                found.push((token, *index, row));
            }
        };
        visit_stored_rows(table, weights, storage, bursts, &mut compare)?;
    }
    found.sort_unstable();
    Ok(joined(&found))
}

fn check_width(table: &Table, base: &StoredWeight) -> Result<()> {
    if table.width() == base.shape[1] {
        return Ok(());
    }
    Err(table.refuse(format!(
        "its shape is {:?}, the base's {:?}",
        table.source.info.shape, base.shape
    )))
}

/// Calls `visit` with each row's token, number and bytes as they are stored.
fn visit_stored_rows(
    table: &Table,
    weights: &mut Weights,
    storage: StorageDtype,
    bursts: &mut Bursts<'_>,
    visit: &mut dyn FnMut(u32, u32, &[u8]),
) -> Result<()> {
    let (mut buffer, mut stored) = (Vec::new(), Vec::new());
    let row_nbytes = table.width() * storage.size();
    let token_of: Option<Vec<u32>> = table.tokens.as_ref().map(|pairs| {
        let mut by_row: Vec<_> = pairs.iter().map(|(token, row)| (*row, *token)).collect();
        by_row.sort_unstable();
        by_row.into_iter().map(|(_, token)| token).collect()
    });
    for rows in pieces(table, 0..table.rows()) {
        let piece = rows_of(table, rows.clone());
        let bytes = weights.read(&piece, &mut buffer)?;
        store(piece.info.dtype, bytes, storage, &mut stored);
        for (row, bytes) in rows.zip(stored.chunks_exact(row_nbytes)) {
            let token = token_of.as_ref().map_or(row as u32, |tokens| tokens[row]);
            visit(token, row as u32, bytes);
        }
        bursts.advance(bytes.len());
    }
    Ok(())
}

/// Rows one after another, in the file and in the vocabulary, as one.
fn joined(found: &[(u32, usize, u32)]) -> Vec<RowRun> {
    let mut runs: Vec<RowRun> = Vec::new();
    for (token, table, row) in found.iter().copied() {
        match runs.last_mut() {
            Some(last)
                if (last.token + last.count, last.table, last.row + last.count)
                    == (token, table, row) =>
            {
                last.count += 1;
            }
            _ => runs.push(RowRun {
                token,
                count: 1,
                table,
                row,
            }),
        }
    }
    runs
}

/// Reads the rows of a block in order, a piece of neighbours at a time.
pub(crate) fn read_rows(
    runs: &[RowRun],
    tables: &Tables,
    weights: &mut Weights,
    bursts: &mut Bursts<'_>,
    mut visit: impl FnMut(Rows<'_>) -> Result<()>,
) -> Result<()> {
    let (mut buffer, mut first) = (Vec::new(), 0);
    for run in runs {
        let table = &tables.all[run.table];
        let end = (run.row + run.count) as usize;
        let rows = run.row as usize..end;
        for rows in pieces(table, rows) {
            let source = rows_of(table, rows.clone());
            let bytes = weights.read(&source, &mut buffer)?;
            visit(Rows {
                first,
                num_before: rows.start * table.width(),
                source: &source,
                bytes,
                ends_run: rows.end == end,
            })?;
            bursts.advance(bytes.len());
            first += rows.len();
        }
    }
    Ok(())
}

fn pieces(table: &Table, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let per_piece = (PIECE_NBYTES / row_nbytes(table).max(1)).max(1);
    let end = rows.end;
    rows.step_by(per_piece)
        .map(move |first| first..end.min(first + per_piece))
}

/// Some rows of a table as a tensor.
fn rows_of(table: &Table, rows: Range<usize>) -> Source {
    let Source { name, info, shard } = &table.source;
    let start = info.data_offsets.0 + rows.start * row_nbytes(table);
    Source {
        name: name.clone(),
        info: TensorInfo {
            dtype: info.dtype,
            shape: vec![rows.len(), table.width()],
            data_offsets: (start, start + rows.len() * row_nbytes(table)),
        },
        shard: *shard,
    }
}

fn row_nbytes(table: &Table) -> usize {
    table.width() * table.source.info.dtype.bitsize() / 8
}
