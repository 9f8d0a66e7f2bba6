//! `Flows`: who shares the engine, and how much each has been served: a virtual token counter a flow.
//!
//! A counter grows by the tokens its flow is served, over its weight, and who has least is served next. A flow of which
//! nothing waited is lifted to where the others are, never lowered: who was away has saved nothing up. That is VTC (Sheng
//! et al., "Fairness in Serving Large Language Models", OSDI 2024), but for where it is lifted to: not to the least
//! counter of those that wait but to the clock, which advances by what is served over the weights of all that wait, and
//! is kept between their counters. Newcomers without end, each at the least counter, would starve whoever has more.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use crate::ids::{FlowId, RequestId};
use crate::request::{Flow, FlowWeight};

/// What a token of a prompt counts, computed, not found in the prefix cache; the paper's.
pub const PROMPT_TOKEN_COST: u64 = 1;
/// What a generated token counts; the paper's.
pub const GENERATED_TOKEN_COST: u64 = 2;

/// Flows kept though nothing of them waits or runs.
const MAX_IDLE_FLOWS: usize = 1024;

/// Tokens, each counted once however often it was computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    pub num_prompt_tokens: u64,
    pub num_generated_tokens: u64,
}

impl Served {
    pub fn cost(self) -> u64 {
        self.num_prompt_tokens * PROMPT_TOKEN_COST
            + self.num_generated_tokens * GENERATED_TOKEN_COST
    }

    fn add(&mut self, other: Self) {
        self.num_prompt_tokens += other.num_prompt_tokens;
        self.num_generated_tokens += other.num_generated_tokens;
    }
}

/// A flow as it is told of.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowStats {
    pub name: Arc<str>,
    pub weight: FlowWeight,
    pub num_waiting: usize,
    pub num_running: usize,
    pub served: Served,
    /// How far its counter is beyond the least of those that wait, in costs over weight; 0 where none waits.
    pub lead: f64,
}

/// Where a flow stands in line: who was served least is first; of equals who has not had a turn for longest.
#[derive(Debug, Clone, Copy, Default)]
pub struct Standing {
    counter: f64,
    since: u64,
}

impl Ord for Standing {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_counter = self.counter.total_cmp(&other.counter);
        by_counter.then(self.since.cmp(&other.since))
    }
}

impl PartialOrd for Standing {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Standing {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Standing {}

#[derive(Debug)]
struct State {
    name: Arc<str>,
    weight: FlowWeight,
    counter: f64,
    served: Served,
    /// In order of arrival.
    waiting: VecDeque<RequestId>,
    num_running: usize,
    /// Of its last turn, or of its coming into the queue, which is less than that of a turn just before.
    since: u64,
}

impl State {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.num_running == 0
    }
}

/// Every flow with requests, and the idle ones last seen.
#[derive(Debug, Default)]
pub struct Flows {
    states: BTreeMap<FlowId, State>,
    by_name: HashMap<Arc<str>, FlowId>,
    /// Those with waiting requests.
    queued: BTreeSet<FlowId>,
    queued_weight: f64,
    clock: f64,
    /// Who waited last, while nobody does.
    last_queued: Option<FlowId>,
    num_turns: u64,
    num_idle: usize,
    forgotten: Served,
    next_flow: u64,
}

impl Flows {
    /// A request arrives; its flow has the weight that it says from now on.
    pub fn arrive(&mut self, flow: &Flow, request: RequestId) -> FlowId {
        let id = match self.by_name.get(&flow.name) {
            Some(&id) => id,
            None => self.add(flow),
        };
        let state = self.state(id);
        let was_idle = state.is_idle();
        state.weight = flow.weight;
        self.num_idle -= usize::from(was_idle);
        self.enqueue(id, request);
        id
    }

    /// A waiting request runs.
    pub fn admit(&mut self, id: FlowId, request: RequestId) {
        self.dequeue(id, request);
        self.state(id).num_running += 1;
    }

    /// A running request waits again.
    pub fn preempt(&mut self, id: FlowId, request: RequestId) {
        self.state(id).num_running -= 1;
        self.enqueue(id, request);
    }

    /// A waiting request has ended.
    pub fn withdraw(&mut self, id: FlowId, request: RequestId) {
        self.dequeue(id, request);
        self.note_idle(id);
    }

    /// A running request has ended.
    pub fn end(&mut self, id: FlowId) {
        self.state(id).num_running -= 1;
        self.note_idle(id);
    }

    pub fn charge(&mut self, id: FlowId, served: Served) {
        let cost = served.cost() as f64;
        let state = self.state(id);
        state.served.add(served);
        state.counter += cost / state.weight.value();
        if !self.queued.is_empty() {
            self.clock += cost / self.queued_weight;
        }
    }

    /// Raises flows that wait for something else than their turn to the least counter of the others that wait.
    pub fn lift(&mut self, idle: &[FlowId]) {
        let others = self.queued.iter().filter(|id| !idle.contains(id));
        let counters = others.map(|id| self.states[id].counter);
        if let Some(least) = counters.min_by(f64::total_cmp) {
            for &id in idle {
                let state = self.state(id);
                state.counter = state.counter.max(least);
            }
        }
    }

    /// Flows with waiting requests.
    pub fn queued(&self) -> impl Iterator<Item = FlowId> + '_ {
        self.queued.iter().copied()
    }

    /// Its place in line.
    pub fn standing(&self, id: FlowId) -> Standing {
        let state = &self.states[&id];
        Standing {
            counter: state.counter,
            since: state.since,
        }
    }

    /// It goes on with a prompt, or begins one.
    pub fn take_turn(&mut self, id: FlowId) {
        self.num_turns += 1;
        self.state(id).since = 2 * self.num_turns + 1;
    }

    /// Of its waiting requests, in order of arrival.
    pub fn waiting(&self, id: FlowId) -> &VecDeque<RequestId> {
        &self.states[&id].waiting
    }

    pub fn num_running(&self, id: FlowId) -> usize {
        self.states[&id].num_running
    }

    /// The flow furthest ahead of another of those that run more than their part, by weight, of all `num_places`.
    pub fn ahead_of(&self, id: FlowId, num_places: usize) -> Option<FlowId> {
        let counter = self.states[&id].counter;
        let active = self.states.iter().filter(|(_, state)| !state.is_idle());
        let weights: f64 = active.clone().map(|(_, state)| state.weight.value()).sum();
        let part = |state: &State| num_places as f64 * state.weight.value() / weights;
        let ahead = active.filter(|(_, state)| {
            state.counter >= counter && state.num_running as f64 > part(state).max(1.0)
        });
        let most = ahead.max_by(|(_, a), (_, b)| a.counter.total_cmp(&b.counter));
        most.map(|(&id, _)| id)
    }

    /// In order of arrival of their first requests.
    pub fn stats(&self) -> Vec<FlowStats> {
        let least = self.queued_range().map(|(least, _)| least);
        let lead = |state: &State| least.map_or(0.0, |least| state.counter - least);
        self.states
            .values()
            .map(|state| FlowStats {
                name: state.name.clone(),
                weight: state.weight,
                num_waiting: state.waiting.len(),
                num_running: state.num_running,
                served: state.served,
                lead: lead(state),
            })
            .collect()
    }

    /// What those were served that are not told of any more.
    pub fn forgotten(&self) -> Served {
        self.forgotten
    }

    /// Panics naming the first invariant that does not hold. `waiting` and `running` are all requests with their flows,
    /// in order of arrival and in any order.
    pub fn check_invariants(
        &self,
        waiting: impl Iterator<Item = (FlowId, RequestId)>,
        running: impl Iterator<Item = FlowId>,
    ) {
        let mut queues = BTreeMap::<FlowId, VecDeque<RequestId>>::new();
        for (flow, request) in waiting {
            queues.entry(flow).or_default().push_back(request);
        }
        let mut num_running = BTreeMap::<FlowId, usize>::new();
        for flow in running {
            *num_running.entry(flow).or_default() += 1;
        }
        assert!(
            self.queued.iter().eq(queues.keys()),
            "flows queue that have waiting requests"
        );
        for (id, state) in &self.states {
            let queue = queues.get(id).cloned().unwrap_or_default();
            assert_eq!(state.waiting, queue, "a flow knows its waiting requests");
            let runs = num_running.get(id).copied().unwrap_or(0);
            assert_eq!(state.num_running, runs, "a flow counts what runs");
            assert_eq!(self.by_name[&state.name], *id, "a name is one flow");
        }
        assert_eq!(self.by_name.len(), self.states.len());
        let num_idle = self.states.values().filter(|state| state.is_idle()).count();
        assert_eq!(self.num_idle, num_idle, "idle flows are counted");
        assert!(num_idle <= MAX_IDLE_FLOWS + 1, "idle flows are bounded");
    }

    fn state(&mut self, id: FlowId) -> &mut State {
        let state = self.states.get_mut(&id);
        state.expect("invariant: a flow with requests is known")
    }

    /// As idle.
    fn add(&mut self, flow: &Flow) -> FlowId {
        let id = FlowId(self.next_flow);
        self.next_flow += 1;
        self.num_idle += 1;
        self.by_name.insert(flow.name.clone(), id);
        self.states.insert(
            id,
            State {
                name: flow.name.clone(),
                weight: flow.weight,
                counter: 0.0,
                served: Served::default(),
                waiting: VecDeque::new(),
                num_running: 0,
                since: 0,
            },
        );
        id
    }

    fn enqueue(&mut self, id: FlowId, request: RequestId) {
        if !self.queued.contains(&id) {
            self.clock = match self.queued_range() {
                Some((least, most)) => self.clock.clamp(least, most),
                None => self
                    .last_queued
                    .map_or(0.0, |last| self.states[&last].counter),
            };
            let (clock, num_turns) = (self.clock, self.num_turns);
            let state = self.state(id);
            state.counter = state.counter.max(clock);
            state.since = 2 * num_turns;
            self.queued.insert(id);
        }
        let waiting = &mut self.state(id).waiting;
        let place = waiting.partition_point(|&other| other < request);
        waiting.insert(place, request);
        self.sum_weights();
    }

    fn dequeue(&mut self, id: FlowId, request: RequestId) {
        let waiting = &mut self.state(id).waiting;
        let place = waiting.binary_search(&request);
        waiting.remove(place.expect("invariant: a flow knows its waiting requests"));
        if waiting.is_empty() {
            self.queued.remove(&id);
            self.last_queued = Some(id);
            self.sum_weights();
        }
    }

    /// Anew, so that no rounding adds up.
    fn sum_weights(&mut self) {
        let weights = self.queued.iter().map(|id| self.states[id].weight.value());
        self.queued_weight = weights.sum();
    }

    /// The least and the greatest counter of those that wait.
    fn queued_range(&self) -> Option<(f64, f64)> {
        let counters = self.queued.iter().map(|id| self.states[id].counter);
        counters.fold(None, |range, counter| {
            let (least, most) = range.unwrap_or((counter, counter));
            Some((least.min(counter), most.max(counter)))
        })
    }

    /// Of too many idle flows the one with the least counter is forgotten: it would be lifted the furthest.
    fn note_idle(&mut self, id: FlowId) {
        if !self.states[&id].is_idle() {
            return;
        }
        self.num_idle += 1;
        if self.num_idle <= MAX_IDLE_FLOWS {
            return;
        }
        let idle = self.states.iter().filter(|(id, state)| {
            state.is_idle() && Some(**id) != self.last_queued // whose counter the next arrival is lifted to
        });
        let least = idle.min_by(|(_, a), (_, b)| a.counter.total_cmp(&b.counter));
        if let Some(id) = least.map(|(&id, _)| id) {
            let state = self.states.remove(&id).expect("it was found there");
            self.by_name.remove(&state.name);
            self.forgotten.add(state.served);
            self.num_idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPT: Served = Served {
        num_prompt_tokens: 100,
        num_generated_tokens: 0,
    };

    fn flow(name: &str, weight: f64) -> Flow {
        Flow {
            name: name.into(),
            weight: FlowWeight::new(weight).unwrap(),
        }
    }

    fn counter(flows: &Flows, id: FlowId) -> u64 {
        flows.states[&id].counter.round() as u64
    }

    #[test]
    fn tokens_count_over_the_weight() {
        let mut flows = Flows::default();
        let id = flows.arrive(&flow("a", 4.0), RequestId(0));
        let served = Served {
            num_prompt_tokens: 10,
            num_generated_tokens: 5,
        };
        flows.charge(id, served);
        assert_eq!(counter(&flows, id), 5);
        assert_eq!(flows.stats()[0].served, served);
    }

    #[test]
    fn who_was_away_has_saved_nothing_up_and_lost_nothing() {
        let mut flows = Flows::default();
        let away = flows.arrive(&flow("away", 1.0), RequestId(0));
        flows.admit(away, RequestId(0));
        flows.end(away);
        let busy = flows.arrive(&flow("busy", 1.0), RequestId(1));
        flows.charge(busy, PROMPT);
        flows.arrive(&flow("away", 1.0), RequestId(2));
        assert_eq!(counter(&flows, away), 100);
        flows.charge(away, PROMPT);
        flows.withdraw(away, RequestId(2));
        flows.arrive(&flow("away", 1.0), RequestId(3));
        assert_eq!(counter(&flows, away), 200, "never lowered");
    }

    #[test]
    fn newcomers_without_end_come_up_to_who_has_been_served_more() {
        let mut flows = Flows::default();
        let heavy = flows.arrive(&flow("heavy", 1.0), RequestId(0));
        let waiting = flows.arrive(&flow("n0", 1.0), RequestId(1));
        flows.charge(heavy, PROMPT);
        flows.clock = 0.0;
        let mut last = waiting;
        for number in 1..50 {
            let next = flows.arrive(&flow(&format!("n{number}"), 1.0), RequestId(number + 1));
            flows.admit(last, RequestId(number));
            flows.take_turn(last);
            flows.charge(last, PROMPT);
            flows.end(last);
            if flows.standing(heavy) < flows.standing(next) {
                return;
            }
            last = next;
        }
        panic!("the heavy flow's turn comes: {flows:?}");
    }

    #[test]
    fn idle_flows_are_forgotten_beyond_a_bound_and_what_they_were_served_is_kept() {
        let mut flows = Flows::default();
        for number in 0..3 * MAX_IDLE_FLOWS as u64 {
            let id = flows.arrive(&flow(&format!("f{number}"), 1.0), RequestId(number));
            flows.admit(id, RequestId(number));
            flows.charge(id, PROMPT);
            flows.end(id);
        }
        assert_eq!(flows.states.len(), MAX_IDLE_FLOWS);
        flows.check_invariants(std::iter::empty(), std::iter::empty());
        let kept: u64 = flows.stats().iter().map(|f| f.served.cost()).sum();
        assert_eq!(kept + flows.forgotten().cost(), 300 * MAX_IDLE_FLOWS as u64);
    }
}
