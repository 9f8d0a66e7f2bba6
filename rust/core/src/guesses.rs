//! `Guesses`: tokens that may come next, each with its chance.

#[derive(Debug, Default)]
pub struct Guesses(Vec<(i32, f32)>);

impl Guesses {
    pub fn scale(&mut self, factor: f32) {
        for (_, chance) in &mut self.0 {
            *chance *= factor;
        }
    }

    pub fn add(&mut self, token: i32, chance: f32) {
        *self.chance(token) += chance;
    }

    /// Takes in what others guess for reasons of their own: a token fails to come where all of them are wrong.
    pub fn join(&mut self, others: &Self) {
        for &(token, chance) in &others.0 {
            self.join_one(token, chance);
        }
    }

    pub fn join_one(&mut self, token: i32, chance: f32) {
        let joined = self.chance(token);
        *joined = 1.0 - (1.0 - *joined) * (1.0 - chance);
    }

    /// The first of those as likely.
    pub fn likeliest(&self) -> Option<(i32, f32)> {
        let mut guesses = self.0.iter().copied();
        let first = guesses.next()?;
        Some(guesses.fold(
            first,
            |best, next| if next.1 > best.1 { next } else { best },
        ))
    }

    fn chance(&mut self, token: i32) -> &mut f32 {
        let found = self.0.iter().position(|&(other, _)| other == token);
        let place = found.unwrap_or_else(|| {
            self.0.push((token, 0.0));
            self.0.len() - 1
        });
        &mut self.0[place].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_that_agree_make_a_token_likelier() {
        let mut guesses = Guesses::default();
        assert_eq!(guesses.likeliest(), None);
        guesses.add(1, 0.25);
        guesses.add(1, 0.25);
        guesses.add(2, 0.4);
        assert_eq!(guesses.likeliest(), Some((1, 0.5)));
        let mut others = Guesses::default();
        others.add(2, 0.5);
        guesses.join(&others);
        assert_eq!(guesses.likeliest(), Some((2, 0.7)));
        guesses.scale(0.5);
        assert_eq!(guesses.likeliest(), Some((2, 0.35)));
    }
}
