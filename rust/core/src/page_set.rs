//! `PageSet`: a bit per page; finds the lowest member and the highest run of members.

use crate::ids::PageId;

const WORD: usize = u64::BITS as usize;

#[derive(Debug, Clone)]
pub struct PageSet {
    words: Vec<u64>,
    len: usize,
    /// No word below this one has a member.
    lowest_word: usize,
}

impl PageSet {
    pub fn full(num_pages: usize) -> Self {
        let mut set = Self {
            words: vec![0; num_pages.div_ceil(WORD)],
            len: 0,
            lowest_word: 0,
        };
        for page in 0..num_pages {
            set.insert(PageId(page as u32));
        }
        set
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn contains(&self, page: PageId) -> bool {
        self.words[page.index() / WORD] & bit(page) != 0
    }

    pub fn insert(&mut self, page: PageId) {
        let word = page.index() / WORD;
        assert!(
            !self.contains(page),
            "invariant: {page:?} joins the set once"
        );
        self.words[word] |= bit(page);
        self.lowest_word = self.lowest_word.min(word);
        self.len += 1;
    }

    pub fn remove(&mut self, page: PageId) {
        assert!(
            self.contains(page),
            "invariant: {page:?} is a member when removed"
        );
        self.words[page.index() / WORD] &= !bit(page);
        self.len -= 1;
    }

    pub fn pop_lowest(&mut self) -> Option<PageId> {
        while *self.words.get(self.lowest_word)? == 0 {
            self.lowest_word += 1;
        }
        let offset = self.words[self.lowest_word].trailing_zeros();
        let page = PageId((self.lowest_word * WORD) as u32 + offset);
        self.remove(page);
        Some(page)
    }

    /// First page of the highest `num_pages` members in a row.
    pub fn highest_run(&self, num_pages: usize) -> Option<PageId> {
        if self.len < num_pages {
            return None;
        }
        let mut run = 0;
        let mut page = self.words.len() * WORD;
        while page > 0 {
            if page.is_multiple_of(WORD) && self.words[page / WORD - 1] == 0 {
                page -= WORD;
                run = 0;
                continue;
            }
            page -= 1;
            run = if self.contains(PageId(page as u32)) {
                run + 1
            } else {
                0
            };
            if run == num_pages {
                return Some(PageId(page as u32));
            }
        }
        None
    }
}

fn bit(page: PageId) -> u64 {
    1 << (page.index() % WORD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_member_comes_out_first_even_after_it_returns() {
        let mut set = PageSet::full(130);
        for expected in 0..130 {
            assert_eq!(set.pop_lowest(), Some(PageId(expected)));
        }
        assert_eq!(set.pop_lowest(), None);
        set.insert(PageId(129));
        set.insert(PageId(3));
        assert_eq!(set.pop_lowest(), Some(PageId(3)));
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn highest_run_crosses_words_and_skips_gaps() {
        let mut set = PageSet::full(200);
        set.remove(PageId(198));
        set.remove(PageId(130));
        assert_eq!(set.highest_run(1), Some(PageId(199)));
        assert_eq!(set.highest_run(2), Some(PageId(196)));
        assert_eq!(set.highest_run(67), Some(PageId(131)));
        assert_eq!(set.highest_run(68), Some(PageId(62)));
        assert_eq!(set.highest_run(131), None);
    }
}
