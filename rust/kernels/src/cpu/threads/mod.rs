//! One fork-join thread pool; the caller works too.
//!
//! A job is a count of tasks and a function of the task index. Workers that are awake join the open
//! job; the caller never waits for one that did not, so a descheduled worker costs nothing. Each thread
//! begins with its own share of the tasks, the same from job to job, and then helps others with theirs.
//! A forked child has none of the threads: it can only drop the pool.

mod prefetch;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;
use std::time::Duration;
use std::{mem, process, thread};

use self::prefetch::{PrefetchRange, Prefetcher};
use super::sync::{
    Arc, AtomicBool, AtomicU64, AtomicUsize, Builder, Instant, JoinHandle, Mutex, MutexGuard,
    Ordering, SPINS_PER_CHECK, UnsafeCell, park, spin_loop, yield_now,
};

/// How long an idle worker spins before it parks: longer than the gap between two ops of a step.
const SPIN: Duration = Duration::from_micros(50);

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// State word: `epoch << 32 | closed << 31 | number of workers inside`.
const CLOSED: u64 = 1 << 31;
const ACTIVE_MASK: u64 = CLOSED - 1;

#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    phases: [usize; 2],
}

/// The next task of a thread's share of each phase, alone on its cache line.
#[derive(Default)]
#[repr(align(64))]
struct Share([AtomicUsize; 2]);

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Job>,
    /// Of every thread, the caller first.
    shares: Vec<Share>,
    prefetch_range: PrefetchRange,
    parked: Vec<AtomicBool>,
    stopping: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only by the one caller inside `run`, while the state is closed with no
// worker inside, and read only by workers that joined the open state.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is only followed while its job is open.
unsafe impl Send for Shared {}

/// A fixed team of threads that runs one parallel loop at a time.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    caller: Mutex<Prefetcher>,
    /// The process that has the workers.
    process: u32,
}

impl ThreadPool {
    /// A team of `num_threads`, the caller of `run` included; `None` means every core.
    pub fn new(num_threads: Option<usize>) -> Self {
        let cores = || thread::available_parallelism().map_or(1, usize::from);
        let num_workers = num_threads.unwrap_or_else(cores).max(1) - 1;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: UnsafeCell::new(Job {
                task: &|_| {},
                phases: [0; 2],
            }),
            shares: (0..=num_workers).map(|_| Share::default()).collect(),
            prefetch_range: PrefetchRange::default(),
            parked: (0..num_workers).map(|_| AtomicBool::new(false)).collect(),
            stopping: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (0..num_workers)
            .map(|index| spawn_worker(index, Arc::clone(&shared)))
            .collect();
        Self {
            shared,
            workers,
            caller: Mutex::new(Prefetcher::new(0, num_workers + 1)),
            process: process::id(),
        }
    }

    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for every `i < num_tasks` and returns when all are done.
    ///
    /// A panic of a task is raised again here. Tasks must not call `run` of the same pool.
    pub fn run(&self, num_tasks: usize, task: &Task<'_>) {
        self.run_phases([0, num_tasks], task);
    }

    /// As `run`; the tasks of the second phase have the indices after the first's, and each begins
    /// when all of the first have at least begun.
    pub fn run_phases(&self, phases: [usize; 2], task: &Task<'_>) {
        let num_tasks = phases[0] + phases[1];
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(task);
            return;
        }
        let mut prefetcher = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        self.open(phases, task);
        self.shared.work(0);
        self.shared.close(&mut prefetcher);
        let panic = self.shared.lock_panic().take();
        drop(prefetcher); // a panic of a task is no fault of the next caller
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Says which `nbytes` a coming job reads, each thread its share of them in order. Threads that wait
    /// prefetch them into their L2; a hint, the address need not be valid.
    pub fn prefetch(&self, address: usize, nbytes: usize) {
        self.shared.prefetch_range.set(address, nbytes);
    }

    fn open(&self, phases: [usize; 2], task: &Task<'_>) {
        let shared = &self.shared;
        let task: *const Task<'_> = task;
        #[allow(clippy::transmute_ptr_to_ptr)] // a cast can't change a trait object's lifetime
        // SAFETY: only the lifetime changes; `close` ends every use of the task before `run` returns.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: the state is closed and empty, and `caller` is locked: nobody else touches `job`.
        shared
            .job
            .with_mut(|job| unsafe { *job = Job { task, phases } });
        let team = shared.shares.len();
        for (thread, share) in shared.shares.iter().enumerate() {
            for (next, num_tasks) in share.0.iter().zip(phases) {
                next.store(first_of(thread, team, num_tasks), Ordering::Relaxed);
            }
        }
        let epoch = shared.state.load(Ordering::Relaxed) >> 32;
        shared.state.store((epoch + 1) << 32, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        for (parked, worker) in self.shared.parked.iter().zip(&self.workers) {
            if parked.load(Ordering::SeqCst) && parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        if process::id() != self.process {
            mem::forget(mem::take(&mut self.workers)); // nobody would ever end a join
            return;
        }
        self.shared.stopping.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so joining can't fail.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Runs tasks of the open job until none is left, those of this thread's share first.
    fn work(&self, thread: usize) {
        // SAFETY: the caller of `run`, or a worker that joined the open state: `job` is fixed until closed.
        let job = self.job.with(|job| unsafe { *job });
        // SAFETY: the task outlives the open job, see `open`.
        let task = unsafe { &*job.task };
        let team = self.shares.len();
        for phase in 0..2 {
            let before = if phase == 0 { 0 } else { job.phases[0] };
            for owner in (thread..team).chain(0..thread) {
                let end = first_of(owner + 1, team, job.phases[phase]);
                loop {
                    let index = self.shares[owner].0[phase].fetch_add(1, Ordering::Relaxed);
                    if index >= end {
                        break;
                    }
                    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| task(before + index))) {
                        self.lock_panic().get_or_insert(payload);
                    }
                }
            }
        }
    }

    /// Lets nobody else in and waits for those inside.
    fn close(&self, prefetcher: &mut Prefetcher) {
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0_u32;
        while self.state.load(Ordering::Acquire) & ACTIVE_MASK != 0 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 14) {
                yield_now();
            } else if !prefetcher.prefetch_some(&self.prefetch_range) {
                spin_loop();
            }
        }
    }

    fn try_join(&self, state: u64) -> bool {
        self.state
            .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    fn leave(&self) {
        self.state.fetch_sub(1, Ordering::Release);
    }

    fn lock_panic(&self) -> MutexGuard<'_, Option<Box<dyn Any + Send>>> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when a job newer than `seen` is open.
    fn is_open(state: u64, seen: u64) -> bool {
        state & CLOSED == 0 && state >> 32 != seen
    }

    /// Waits for a job newer than `seen`: spins, then parks. `None` when the pool stops.
    fn wait_for_job(&self, index: usize, seen: u64, prefetcher: &mut Prefetcher) -> Option<u64> {
        let mut start = Instant::now();
        loop {
            for _ in 0..SPINS_PER_CHECK {
                let state = self.state.load(Ordering::SeqCst);
                if Self::is_open(state, seen) {
                    return Some(state);
                }
                if !prefetcher.prefetch_some(&self.prefetch_range) {
                    spin_loop();
                }
            }
            if self.stopping.load(Ordering::SeqCst) {
                return None;
            }
            if start.elapsed() > SPIN {
                self.park(index, seen);
                start = Instant::now();
            }
        }
    }

    fn park(&self, index: usize, seen: u64) {
        self.parked[index].store(true, Ordering::SeqCst);
        let nothing_to_do = !Self::is_open(self.state.load(Ordering::SeqCst), seen);
        if nothing_to_do && !self.stopping.load(Ordering::SeqCst) {
            park();
        }
        self.parked[index].store(false, Ordering::SeqCst);
    }
}

fn spawn_worker(index: usize, shared: Arc<Shared>) -> JoinHandle<()> {
    Builder::new()
        .name(format!("loraserve-cpu-{}", index + 1))
        .spawn(move || {
            let mut seen = 0;
            let mut prefetcher = Prefetcher::new(index + 1, shared.shares.len());
            while let Some(state) = shared.wait_for_job(index, seen, &mut prefetcher) {
                if shared.try_join(state) {
                    seen = state >> 32;
                    shared.work(index + 1);
                    shared.leave();
                }
            }
        })
        .expect("the operating system can start a thread")
}

/// The first task of a thread's share.
fn first_of(thread: usize, team: usize, num_tasks: usize) -> usize {
    num_tasks * thread / team
}

/// A pointer that tasks of one job may write through, each to its own elements.
pub struct Shareable<T>(*mut T);

impl<T> Clone for Shareable<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shareable<T> {}

// SAFETY: whoever dereferences the pointer guarantees that tasks write disjoint elements.
unsafe impl<T: Send> Send for Shareable<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shareable<T> {}

impl<T> Shareable<T> {
    pub fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    pub fn from_ptr(pointer: *mut T) -> Self {
        Self(pointer)
    }

    pub fn get(self) -> *mut T {
        self.0
    }
}
