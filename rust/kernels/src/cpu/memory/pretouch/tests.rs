use super::*;
use std::io;
use std::ptr;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

const NBYTES: usize = 256 << 20;

/// Fresh memory, unmapped at the end; a page on either side keeps it apart from other mappings.
struct Mapping {
    base: usize,
}

impl Mapping {
    fn new() -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let nbytes = NBYTES + 2 * SMALL_PAGE;
        // SAFETY: a new mapping, wherever the system wants it.
        let start = unsafe { libc::mmap(ptr::null_mut(), nbytes, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        let base = start as usize + SMALL_PAGE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a part of what was just mapped.
        let rc = unsafe { libc::mprotect(base as *mut _, NBYTES, access) };
        assert_eq!(rc, 0, "{}", io::Error::last_os_error());
        Self { base }
    }

    fn pretouch(&self, touch: Touch) -> PoolPretouch {
        // SAFETY: tests drop a `PoolPretouch` before its mapping.
        unsafe { PoolPretouch::with(self.base, NBYTES, touch) }
    }

    /// Bytes that are real, from the start, from the end, and between.
    fn resident(&self) -> (usize, usize, usize) {
        let mut pages = vec![0_u8; NBYTES / SMALL_PAGE];
        // SAFETY: the range is mapped, and there is a byte for every page of it.
        let rc = unsafe { libc::mincore(self.base as *mut _, NBYTES, pages.as_mut_ptr()) };
        assert_eq!(rc, 0, "{}", io::Error::last_os_error());
        let is_real = |page: &&u8| **page & 1 != 0;
        let total = pages.iter().filter(is_real).count() * SMALL_PAGE;
        let low = pages.iter().take_while(is_real).count() * SMALL_PAGE;
        let high = pages.iter().rev().take_while(is_real).count() * SMALL_PAGE;
        (low, high, total - low - high)
    }

    /// Waits until the margins stand beyond `low` and `high` used bytes and nothing else is real.
    fn wait_for(&self, low: usize, high: usize) {
        let stands =
            |used: usize, real: usize| (used + MARGIN..=used + MARGIN + HUGE_PAGE).contains(&real);
        wait_until(|| {
            let (of_low, of_high, between) = self.resident();
            stands(low, of_low) && stands(high, of_high) && between == 0
        });
    }

    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: the range is mapped and all access to it is atomic, or the system's.
        unsafe { std::slice::from_raw_parts(self.base as *const AtomicU8, NBYTES) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; nobody uses it any more.
        unsafe { libc::munmap((self.base - SMALL_PAGE) as *mut _, NBYTES + 2 * SMALL_PAGE) };
    }
}

fn wait_until(mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "it never came");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn margins_are_touched_and_follow_use_and_nothing_beyond_is() {
    let mapping = Mapping::new();
    let pretouch = mapping.pretouch(touch);
    mapping.wait_for(0, 0);
    pretouch.use_below(10 << 20);
    mapping.wait_for(10 << 20, 0);
    pretouch.use_above(NBYTES - (20 << 20));
    mapping.wait_for(10 << 20, 20 << 20);
    pretouch.use_below(5 << 20);
    pretouch.use_above(NBYTES - (1 << 20));
    mapping.wait_for(10 << 20, 20 << 20);
}

#[test]
fn beside_a_running_model_half_a_margin_will_do() {
    let mapping = Mapping::new();
    let pretouch = mapping.pretouch(touch);
    mapping.wait_for(0, 0);
    pretouch.set_contended(true);
    pretouch.use_below(MARGIN);
    wait_until(|| mapping.resident().0 >= MARGIN + MARGIN / 2);
    thread::sleep(Duration::from_millis(20));
    assert!(mapping.resident().0 <= MARGIN + MARGIN / 2 + HUGE_PAGE);
    pretouch.set_contended(false);
    mapping.wait_for(MARGIN, 0);
}

#[test]
fn touching_maps_memory_of_its_own_not_the_shared_zeros() {
    let mapping = Mapping::new();
    touch(mapping.base..mapping.base + NBYTES);
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let first = format!("{:x}-", mapping.base);
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&first));
    let rss = lines.find(|line| line.starts_with("Rss:")).unwrap(); // counts no shared zeros
    let kib: usize = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(kib << 10, NBYTES);
}

#[test]
fn bytes_written_meanwhile_stay() {
    let mapping = Mapping::new();
    let bytes = || mapping.bytes().iter().step_by(61);
    let pretouch = mapping.pretouch(touch);
    for (index, byte) in bytes().enumerate() {
        byte.store(index as u8, Ordering::Relaxed);
    }
    pretouch.use_below(NBYTES);
    drop(pretouch);
    let is_kept = |(index, byte): (usize, &AtomicU8)| byte.load(Ordering::Relaxed) == index as u8;
    assert!(bytes().enumerate().all(is_kept));
}

#[test]
fn a_stopped_thread_touches_nothing_more() {
    static IS_RUNNING: AtomicBool = AtomicBool::new(false);
    let slow: Touch = |_| {
        IS_RUNNING.store(true, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20));
        IS_RUNNING.store(false, Ordering::SeqCst);
    };
    let mapping = Mapping::new();
    let pretouch = mapping.pretouch(slow);
    wait_until(|| IS_RUNNING.load(Ordering::SeqCst));
    pretouch.stop();
    assert!(!IS_RUNNING.load(Ordering::SeqCst));
    assert!(pretouch.thread.lock().unwrap().is_none());
    pretouch.stop();
}

#[test]
fn the_smaller_margin_grows_first_and_a_small_pool_is_touched_once() {
    let mut margins = Margins::new(100..4 * HUGE_PAGE + 100);
    let steps: Vec<_> = std::iter::from_fn(|| margins.next_huge_page(MARGIN)).collect();
    let expected = [
        4 * HUGE_PAGE..4 * HUGE_PAGE + 100,
        100..HUGE_PAGE,
        3 * HUGE_PAGE..4 * HUGE_PAGE,
        HUGE_PAGE..2 * HUGE_PAGE,
        2 * HUGE_PAGE..3 * HUGE_PAGE,
    ];
    assert_eq!(steps, expected);
}

#[test]
fn used_memory_is_not_touched_again() {
    let mut margins = Margins::new(0..10 * HUGE_PAGE);
    margins.use_below(3 * HUGE_PAGE + 1);
    margins.use_above(8 * HUGE_PAGE);
    let mut steps: Vec<_> = std::iter::from_fn(|| margins.next_huge_page(MARGIN)).collect();
    steps.sort_by_key(|range| range.start);
    let ends = (steps.first().unwrap().start, steps.last().unwrap().end);
    assert_eq!(ends, (3 * HUGE_PAGE + 1, 8 * HUGE_PAGE));
    margins.use_below(9 * HUGE_PAGE);
    margins.use_above(HUGE_PAGE);
    assert_eq!(margins.next_huge_page(MARGIN), None);
}
