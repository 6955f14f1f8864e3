//! Order of the work and what of it is shared: token ids only.
//!
//! In come the jobs (one a row and sample) of a run; out goes a [`Batch`]: the same jobs in the
//! order they enter the slots, and a tree of shared prefixes to compute once. Jobs that share a
//! prefix follow one another (depth-first order), so the prefixes needed at one time are the
//! path to the present job. Results carry row and sample, so the order here shows nowhere else.
//!
//! Sharing stops one token before a prompt's end: the last prompt token is always a row of its
//! own, so the K samples of a row share its prompt less that token, with no case of their own.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::engine::TokenId;

/// One sample of one row.
#[derive(Clone, Debug)]
pub struct Job {
    /// Index of the row in the caller's order.
    pub row: usize,
    pub sample: u32,
    pub prompt: Arc<[TokenId]>,
    pub max_new_tokens: usize,
    /// Hash of the row's key; with seed, sample and position it keys the generator.
    pub row_hash: u64,
    /// Another stage of the row may follow, whose prompt begins with this one: the prompt is held
    /// as a prefix until then.
    pub may_go_on: bool,
}

impl Job {
    /// The tokens that may be shared: all but the prompt's last.
    pub fn sharable(&self) -> &[TokenId] {
        match self.prompt.split_last() {
            Some((_, head)) => head,
            None => &[],
        }
    }

    /// This job and the one that may follow it: what may begin from its prompt.
    fn n_stages(&self) -> usize {
        1 + usize::from(self.may_go_on)
    }

    fn expected_length(&self) -> usize {
        self.prompt.len().saturating_add(self.max_new_tokens)
    }
}

/// What may be shared.
#[derive(Clone, Copy, Debug)]
pub struct BatchOptions {
    /// Levels of the prefix tree, at most the backend's fork sequences; 0 shares nothing.
    pub max_depth: usize,
    /// Tokens a prefix must add to its parent's.
    pub min_extension: usize,
}

/// Tokens a prefix must add to be worth a fork point, unless the caller says otherwise.
pub const MIN_EXTENSION: usize = 16;

impl BatchOptions {
    pub fn new(max_depth: usize) -> Self {
        Self {
            max_depth,
            min_extension: MIN_EXTENSION,
        }
    }
}

/// A run of tokens that at least two jobs begin with, next stages counted.
#[derive(Clone, Debug)]
pub struct Prefix {
    /// The shorter prefix this one goes on from.
    pub parent: Option<usize>,
    /// 0 for a prefix without a parent.
    pub depth: usize,
    /// Positions it holds: `prompt[..n_tokens]`.
    pub n_tokens: usize,
    /// A prompt that begins with it.
    pub prompt: Arc<[TokenId]>,
    /// Jobs below it in the tree, and the next stages that these may have.
    pub n_jobs: usize,
}

/// A job and the longest prefix it may begin from.
#[derive(Clone, Debug)]
pub struct PlannedJob {
    pub job: Job,
    pub prefix: Option<usize>,
}

/// All jobs in execution order and the prefixes they share.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub jobs: Vec<PlannedJob>,
    pub prefixes: Vec<Prefix>,
}

impl Batch {
    /// The prefixes from `prefix` up to its root, deepest first.
    pub fn path(&self, prefix: Option<usize>) -> impl Iterator<Item = usize> + '_ {
        std::iter::successors(prefix, |&at| self.prefixes[at].parent)
    }

    /// Prompt tokens that need no computing because a prefix holds them, when every next stage
    /// comes.
    pub fn n_reused_tokens(&self) -> usize {
        let held = |at: usize| self.prefixes[at].n_tokens;
        let by_jobs: usize = self
            .jobs
            .iter()
            .filter_map(|planned| Some(planned.job.n_stages() * held(planned.prefix?)))
            .sum();
        let computed: usize = self
            .prefixes
            .iter()
            .map(|prefix| prefix.n_tokens - prefix.parent.map_or(0, held))
            .sum();
        by_jobs - computed
    }
}

/// Plans a batch: groups with the longest prefix first, then by expected length (prompt plus
/// budget), longest first, so that the last rows to finish are short; then the original order.
pub fn plan(jobs: Vec<Job>, options: &BatchOptions) -> Batch {
    let (prefixes, prefix_of_job) = if options.max_depth == 0 {
        (Vec::new(), vec![None; jobs.len()])
    } else {
        find_prefixes(&jobs, options)
    };
    let order = execution_order(&jobs, &prefixes, &prefix_of_job);
    let mut jobs: Vec<Option<Job>> = jobs.into_iter().map(Some).collect();
    let jobs = order
        .into_iter()
        .filter_map(|at| {
            let job = jobs[at].take()?;
            let prefix = prefix_of_job[at];
            Some(PlannedJob { job, prefix })
        })
        .collect();
    Batch { jobs, prefixes }
}

/// A maximal run of sorted jobs that share `n_tokens` tokens (an LCP interval).
struct Interval {
    n_tokens: usize,
    parent: usize,
    job: usize,
}

/// The prefix tree: the LCP intervals of the sorted jobs, less those that add too little or lie
/// too deep. Also each job's longest prefix.
fn find_prefixes(jobs: &[Job], options: &BatchOptions) -> (Vec<Prefix>, Vec<Option<usize>>) {
    // A job that may go on stands twice: its next stage has the same beginning.
    let mut sorted: Vec<usize> = (0..jobs.len())
        .flat_map(|at| std::iter::repeat_n(at, jobs[at].n_stages()))
        .collect();
    sorted.sort_by(|&a, &b| {
        if Arc::ptr_eq(&jobs[a].prompt, &jobs[b].prompt) {
            a.cmp(&b)
        } else {
            jobs[a].sharable().cmp(jobs[b].sharable()).then(a.cmp(&b))
        }
    });
    let (intervals, interval_of_job) = find_intervals(jobs, &sorted);

    // A parent has fewer tokens than its children, so ascending order meets it first.
    let mut ascending: Vec<usize> = (1..intervals.len()).collect();
    ascending.sort_by_key(|&at| (intervals[at].n_tokens, at));
    let mut prefixes: Vec<Prefix> = Vec::new();
    // The kept prefix that stands for each interval: its own or its nearest kept ancestor's.
    let mut kept: Vec<Option<usize>> = vec![None; intervals.len()];
    for at in ascending {
        let interval = &intervals[at];
        let parent = kept[interval.parent];
        let (held, depth) = parent.map_or((0, 0), |p: usize| {
            (prefixes[p].n_tokens, prefixes[p].depth + 1)
        });
        let adds_enough = interval.n_tokens >= held + options.min_extension.max(1);
        kept[at] = if adds_enough && depth < options.max_depth {
            prefixes.push(Prefix {
                parent,
                depth,
                n_tokens: interval.n_tokens,
                prompt: jobs[interval.job].prompt.clone(),
                n_jobs: 0,
            });
            Some(prefixes.len() - 1)
        } else {
            parent
        };
    }
    let prefix_of_job: Vec<Option<usize>> = interval_of_job
        .iter()
        .map(|&interval| kept[interval])
        .collect();
    for (job, prefix) in jobs.iter().zip(&prefix_of_job) {
        let mut at = *prefix;
        while let Some(prefix) = at {
            prefixes[prefix].n_jobs += job.n_stages();
            at = prefixes[prefix].parent;
        }
    }
    (prefixes, prefix_of_job)
}

/// The LCP intervals of the sorted jobs, the empty root first, and the deepest one of each job
/// (Abouelhoda, Kurtz and Ohlebusch 2004, algorithm 4.4).
fn find_intervals(jobs: &[Job], sorted: &[usize]) -> (Vec<Interval>, Vec<usize>) {
    let root = Interval {
        n_tokens: 0,
        parent: 0,
        job: 0,
    };
    let mut intervals = vec![root];
    let mut stack = vec![0usize];
    let mut interval_of_job = vec![0; jobs.len()];
    let mut shared_with_last = 0;
    for (i, &job) in sorted.iter().enumerate() {
        let shared_with_next = sorted
            .get(i + 1)
            .map_or(0, |&next| common_prefix(&jobs[job], &jobs[next]));
        // The top of the stack is the interval of the border before this job.
        let before = stack[stack.len() - 1];
        let mut closed = None;
        while let [.., lower, top] = stack[..]
            && intervals[top].n_tokens > shared_with_next
        {
            stack.pop();
            intervals[top].parent = lower;
            closed = Some(top);
        }
        let top = stack[stack.len() - 1];
        if intervals[top].n_tokens < shared_with_next {
            let new = intervals.len();
            intervals.push(Interval {
                n_tokens: shared_with_next,
                parent: top,
                job,
            });
            if let Some(closed) = closed {
                intervals[closed].parent = new;
            }
            stack.push(new);
        }
        interval_of_job[job] = if shared_with_last >= shared_with_next {
            before
        } else {
            stack[stack.len() - 1]
        };
        shared_with_last = shared_with_next;
    }
    (intervals, interval_of_job)
}

fn common_prefix(a: &Job, b: &Job) -> usize {
    let (a_tokens, b_tokens) = (a.sharable(), b.sharable());
    if Arc::ptr_eq(&a.prompt, &b.prompt) {
        return a_tokens.len();
    }
    a_tokens
        .iter()
        .zip(b_tokens)
        .take_while(|(a, b)| a == b)
        .count()
}

/// A node of the walk: a prefix with all below it, or a single job.
#[derive(Clone, Copy)]
enum Node {
    Prefix(usize),
    Job(usize),
}

/// Depth-first order of the jobs.
fn execution_order(
    jobs: &[Job],
    prefixes: &[Prefix],
    prefix_of_job: &[Option<usize>],
) -> Vec<usize> {
    // Of each prefix: the longest expected length and the first job below it.
    let mut longest = vec![0usize; prefixes.len()];
    let mut first = vec![usize::MAX; prefixes.len()];
    for (at, job) in jobs.iter().enumerate() {
        let mut above = prefix_of_job[at];
        while let Some(prefix) = above {
            longest[prefix] = longest[prefix].max(job.expected_length());
            first[prefix] = first[prefix].min(at);
            above = prefixes[prefix].parent;
        }
    }
    let mut children: Vec<Vec<Node>> = vec![Vec::new(); prefixes.len() + 1];
    let slot = |parent: Option<usize>| parent.map_or(0, |prefix| prefix + 1);
    for (at, prefix) in prefixes.iter().enumerate() {
        children[slot(prefix.parent)].push(Node::Prefix(at));
    }
    for (at, prefix) in prefix_of_job.iter().enumerate() {
        children[slot(*prefix)].push(Node::Job(at));
    }
    for nodes in &mut children {
        nodes.sort_by_key(|node| match *node {
            Node::Prefix(at) => (
                Reverse(prefixes[at].n_tokens),
                Reverse(longest[at]),
                first[at],
            ),
            Node::Job(at) => (Reverse(0), Reverse(jobs[at].expected_length()), at),
        });
    }
    let mut order = Vec::with_capacity(jobs.len());
    let mut stack: Vec<Node> = children[0].iter().rev().copied().collect();
    while let Some(node) = stack.pop() {
        match node {
            Node::Job(at) => order.push(at),
            Node::Prefix(at) => stack.extend(children[at + 1].iter().rev()),
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn job(row: usize, prompt: &[TokenId]) -> Job {
        Job {
            row,
            sample: 0,
            prompt: prompt.into(),
            max_new_tokens: 8,
            row_hash: row as u64,
            may_go_on: false,
        }
    }

    fn tokens(parts: &[(TokenId, usize)]) -> Vec<TokenId> {
        parts
            .iter()
            .flat_map(|&(token, n)| std::iter::repeat_n(token, n))
            .collect()
    }

    fn rows(batch: &Batch) -> Vec<usize> {
        batch.jobs.iter().map(|planned| planned.job.row).collect()
    }

    #[test]
    fn a_system_prompt_and_samples_make_two_levels() {
        let a = tokens(&[(1, 40), (2, 30)]);
        let b = tokens(&[(1, 40), (3, 20)]);
        let jobs = vec![job(0, &b), job(1, &a), job(1, &a), job(0, &b)];
        let batch = plan(jobs, &BatchOptions::new(4));
        let held: Vec<_> = batch
            .prefixes
            .iter()
            .map(|p| (p.parent, p.depth, p.n_tokens, p.n_jobs))
            .collect();
        assert_eq!(
            held,
            [(None, 0, 40, 4), (Some(0), 1, 59, 2), (Some(0), 1, 69, 2)]
        );
        assert_eq!(rows(&batch), [1, 1, 0, 0], "the longest prefix goes first");
        assert_eq!(batch.n_reused_tokens(), 2 * 69 + 2 * 59 - 40 - 19 - 29);
    }

    #[test]
    fn a_job_that_may_go_on_shares_its_prompt_with_its_next_stage() {
        let (a, b) = (tokens(&[(1, 40), (2, 30)]), tokens(&[(1, 40), (3, 20)]));
        let goes_on = Job {
            may_go_on: true,
            ..job(1, &a)
        };
        let batch = plan(vec![job(0, &b), goes_on], &BatchOptions::new(4));
        let held: Vec<_> = batch
            .prefixes
            .iter()
            .map(|p| (p.parent, p.n_tokens, p.n_jobs))
            .collect();
        assert_eq!(held, [(None, 40, 3), (Some(0), 69, 2)]);
        assert_eq!(batch.n_reused_tokens(), 2 * 69 + 40 - 40 - 29);
    }

    #[test]
    fn too_few_levels_share_only_the_upper_ones() {
        let a = tokens(&[(1, 40), (2, 30)]);
        let b = tokens(&[(1, 40), (3, 20)]);
        let jobs = vec![job(0, &b), job(1, &a), job(1, &a), job(0, &b)];
        let batch = plan(jobs, &BatchOptions::new(1));
        assert_eq!(batch.prefixes.len(), 1);
        assert!(batch.jobs.iter().all(|planned| planned.prefix == Some(0)));
    }

    #[test]
    fn nothing_is_shared_with_reuse_off_or_below_the_minimum() {
        let a = tokens(&[(1, 40)]);
        let jobs = || vec![job(0, &a), job(1, &a)];
        assert!(plan(jobs(), &BatchOptions::new(0)).prefixes.is_empty());
        let short = tokens(&[(1, 16)]);
        let batch = plan(vec![job(0, &short), job(1, &short)], &BatchOptions::new(3));
        assert!(batch.prefixes.is_empty(), "15 sharable tokens are too few");
    }

    #[test]
    fn a_prompt_that_continues_another_shares_all_but_its_last_token() {
        let short = tokens(&[(1, 30)]);
        let long = tokens(&[(1, 60)]);
        let batch = plan(vec![job(0, &short), job(1, &long)], &BatchOptions::new(2));
        assert_eq!(batch.prefixes.len(), 1);
        assert_eq!(batch.prefixes[0].n_tokens, 29);
    }

    #[test]
    fn rows_alone_go_by_expected_length() {
        let mut jobs: Vec<Job> = [3, 9, 5, 9]
            .iter()
            .enumerate()
            .map(|(row, &n)| job(row, &tokens(&[(row as TokenId, n)])))
            .collect();
        jobs[0].max_new_tokens = 100;
        assert_eq!(rows(&plan(jobs, &BatchOptions::new(2))), [0, 1, 3, 2]);
        assert!(plan(Vec::new(), &BatchOptions::new(2)).jobs.is_empty());
        let empty = plan(vec![job(0, &[]), job(1, &[])], &BatchOptions::new(2));
        assert_eq!(rows(&empty), [0, 1]);
    }

    proptest! {
        #[test]
        fn every_job_is_planned_once_and_prefixes_really_are_shared(
            prompts in prop::collection::vec(
                prop::collection::vec((0u32..3, 1usize..12), 0..5), 0..30),
            n_samples in 1u32..4,
            max_depth in 0usize..4,
            min_extension in 0usize..20,
        ) {
            let mut jobs = Vec::new();
            for (row, parts) in prompts.iter().enumerate() {
                let prompt: Arc<[TokenId]> = tokens(parts).into();
                for sample in 0..n_samples {
                    jobs.push(Job { sample, prompt: prompt.clone(), ..job(row, &[]) });
                }
            }
            let n_jobs = jobs.len();
            let options = BatchOptions { max_depth, min_extension };
            let batch = plan(jobs, &options);

            let mut seen: Vec<_> =
                batch.jobs.iter().map(|p| (p.job.row, p.job.sample)).collect();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), n_jobs);
            if max_depth == 0 {
                prop_assert!(batch.prefixes.is_empty());
            }
            let mut n_below = vec![0; batch.prefixes.len()];
            for planned in &batch.jobs {
                for at in batch.path(planned.prefix) {
                    let prefix = &batch.prefixes[at];
                    n_below[at] += 1;
                    prop_assert!(prefix.depth < max_depth);
                    prop_assert!(prefix.n_tokens < planned.job.prompt.len());
                    prop_assert_eq!(
                        &prefix.prompt[..prefix.n_tokens],
                        &planned.job.prompt[..prefix.n_tokens]
                    );
                }
            }
            for (at, prefix) in batch.prefixes.iter().enumerate() {
                let held = prefix.parent.map_or(0, |p| batch.prefixes[p].n_tokens);
                prop_assert!(prefix.n_tokens >= held + min_extension.max(1));
                prop_assert!(prefix.n_jobs >= 2);
                prop_assert_eq!(prefix.n_jobs, n_below[at]);
            }
            // Depth-first: the jobs of a prefix are neighbours.
            for at in 0..batch.prefixes.len() {
                let below = |p: &PlannedJob| batch.path(p.prefix).any(|x| x == at);
                let n_runs = batch
                    .jobs
                    .chunk_by(|a, b| below(a) == below(b))
                    .filter(|run| below(&run[0]))
                    .count();
                prop_assert_eq!(n_runs, 1);
            }
        }

        /// Without limits, two jobs next to each other in sorted order share all they can.
        #[test]
        fn unlimited_sharing_leaves_nothing_on_the_table(
            prompts in prop::collection::vec(prop::collection::vec(0u32..2, 1..10), 2..20),
        ) {
            let jobs: Vec<Job> = prompts.iter().enumerate().map(|(i, p)| job(i, p)).collect();
            let mut heads: Vec<Vec<TokenId>> =
                jobs.iter().map(|j| j.sharable().to_vec()).collect();
            heads.sort();
            let mut distinct = std::collections::BTreeSet::new();
            for head in &heads {
                for n in 1..=head.len() {
                    distinct.insert(head[..n].to_vec());
                }
            }
            let total: usize = heads.iter().map(Vec::len).sum();
            let options = BatchOptions { max_depth: usize::MAX, min_extension: 1 };
            prop_assert_eq!(plan(jobs, &options).n_reused_tokens(), total - distinct.len());
        }
    }
}
